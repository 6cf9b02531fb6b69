r"""Host files: which machines there are, in the order of their ranks.

A line names a machine: ``[USER@]ADDRESS[:SSH_PORT] [NUMBER]``, with an IPv6 address in brackets where an ssh port
follows. ``#`` begins a comment. The number is what the ``ip_config.txt`` of other tools has there:

- an id, if the numbers of all lines are 0 to n - 1 in any order: the machine's place;
- else below 1024 a port of ssh (``10.0.0.1 22``, as PyG's examples have it);
- else the port at which the workers meet, if the machine is the first (``10.0.0.1 30050``, as DGL has it).

A file whose name ends in ``.yaml`` or ``.yml`` may instead hold a list, or a list under ``hosts``, of such lines or of
mappings with ``address`` and, if wanted, ``user``, ``ssh_port``, ``port``, ``id`` and ``interface``.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partpar.errors import PartparError

_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_YAML = re.compile(r"-(\s|--|$)|\w+:(\s|$)")  # how a list, a document or a mapping begins
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,15}")
_MOST_BYTES = 1 << 24  # of a file
_SSH_PORT = 22
_WORKER_PORTS = 1024  # workers need no port below, which only root may listen on


class HostFileError(PartparError, ValueError):
    r"""A host file does not say which machines there are; the message names file and line."""


@dataclass(frozen=True)
class Host:
    r"""One machine.

    Args:
        address: Its name or address, without brackets.
        user: To log in as, or :obj:`None` for what ssh is configured to.
        ssh_port: Where its sshd listens, or :obj:`None` for what ssh is configured to.
        port: Where the workers meet, if this is the first machine.
        interface: Network interface that its workers use, or :obj:`None` to find it by the address.
    """

    address: str
    user: str | None = None
    ssh_port: int | None = None
    port: int | None = None
    interface: str | None = None

    @property
    def label(self) -> str:
        r"""How messages call it."""
        return self.address if self.ssh_port is None else f"{self.bracketed}:{self.ssh_port}"

    @property
    def bracketed(self) -> str:
        r"""The address as it stands before a colon."""
        return f"[{self.address}]" if ":" in self.address else self.address

    @property
    def target(self) -> str:
        r"""``user@address``, as ssh takes it."""
        return self.address if self.user is None else f"{self.user}@{self.address}"

    @property
    def is_loopback(self) -> bool:
        r"""Whether it is this machine, by an address that no other can reach."""
        try:
            return ipaddress.ip_address(self.address.partition("%")[0]).is_loopback
        except ValueError:
            return self.address == "localhost"


@dataclass(frozen=True)
class _Entry:
    r"""A host as the file has it, before it is known what its number means."""

    line: int
    host: Host
    number: int | None = None
    is_id: bool = False


def read_hosts(path: str | Path) -> list[Host]:
    r"""Reads a host file.

    Returns:
        The machines, by id where the file gives ids, else in its order.

    Raises:
        HostFileError: If it cannot be read, names no machine or one twice, or a line is none.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise HostFileError(f"{path}: expected a file of hosts, found none to read: {error}") from error
    if len(content) > _MOST_BYTES:
        raise HostFileError(f"{path}: expected a file of hosts, at most {_MOST_BYTES} bytes, found more")
    numbered = ((number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    lines = [(number, line) for number, line in numbered if line]
    # PyG's ip_config.yaml holds plain lines.
    if path.suffix in (".yaml", ".yml") and lines and _YAML.match(lines[0][1]):
        entries = _yaml_entries(path, text)
    else:
        entries = [_line_entry(path, number, line) for number, line in lines]
    if not entries:
        raise HostFileError(f"{path}: expected a line for each host, found none")
    ordered = _in_order(path, entries)
    seen: dict[tuple[str, int | None], int] = {}
    for entry in ordered:
        key = (entry.host.address, entry.host.ssh_port)
        if key in seen:
            raise HostFileError(
                f"{path}:{entry.line}: expected each host once, found {entry.host.label} again after line {seen[key]}; "
                "several workers of one host are started by --nproc-per-node"
            )
        seen[key] = entry.line
    return [entry.host for entry in ordered]


def _in_order(path: Path, entries: list[_Entry]) -> list[_Entry]:
    numbers = sorted(-1 if entry.number is None else entry.number for entry in entries)
    if numbers == [*range(len(entries))]:
        return sorted(entries, key=lambda entry: entry.number or 0)
    for entry in entries:
        if entry.is_id:
            raise HostFileError(
                f"{path}:{entry.line}: expected ids 0 to {len(entries) - 1}, or none at all, found the id {entry.number} "
                f"among {len(entries)} hosts"
            )
    return [_with_port(path, entry) for entry in entries]


def _with_port(path: Path, entry: _Entry) -> _Entry:
    if entry.number is None:
        return entry
    if entry.number >= _WORKER_PORTS:
        return replace(entry, host=replace(entry.host, port=entry.number))
    if entry.number < _SSH_PORT:
        raise HostFileError(
            f"{path}:{entry.line}: expected a port from {_SSH_PORT}, or ids from 0 to the number of hosts less one on all "
            f"lines, found {entry.number}"
        )
    if entry.host.ssh_port is not None:
        raise HostFileError(
            f"{path}:{entry.line}: expected one ssh port, found {entry.host.ssh_port} and {entry.number}"
        )
    return replace(entry, host=replace(entry.host, ssh_port=entry.number))


def _line_entry(path: Path, line: int, text: str) -> _Entry:
    words = text.split()
    if not 1 <= len(words) <= 2:
        raise HostFileError(
            f"{path}:{line}: expected [USER@]ADDRESS[:SSH_PORT] [PORT or ID], found {len(words)} words: {text!r}"
        )
    host = _host(path, line, words[0])
    if len(words) == 1:
        return _Entry(line, host)
    return _Entry(line, host, _integer(path, line, "port or id", words[1], 0))


def _host(path: Path, line: int, word: str) -> Host:
    r"""Reads ``[USER@]ADDRESS[:SSH_PORT]``."""
    user, at, place = word.rpartition("@")
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", place)
    if bracketed is not None:
        address, port = bracketed[1], bracketed[2]
    elif place.count(":") == 1:
        address, _, port = place.partition(":")
    else:
        address, port = place, None
    _check_address(path, line, address)
    return Host(
        address,
        _matching(path, line, "user", user, _USER) if at else None,
        None if port is None else _integer(path, line, "ssh port", port, 1),
    )


def _check_address(path: Path, line: int, address: str) -> None:
    # Only digits and dots: meant as IPv4, so that 10.0.0.256 is no name to look up.
    meant = re.fullmatch(r"[\d.]+", address) or ":" in address
    if meant:
        plain, zoned, zone = address.partition("%")
        try:
            ipaddress.ip_address(plain)
        except ValueError as error:
            raise HostFileError(f"{path}:{line}: expected an address, found {address!r}: {error}") from error
        if zoned:
            _matching(path, line, "interface after '%'", zone, _INTERFACE)
    else:
        _matching(path, line, "name or address of a host", address, _NAME)


def _matching(path: Path, line: int, what: str, text: Any, pattern: re.Pattern[str]) -> str:
    # What begins with "-" would be an option of ssh.
    if not isinstance(text, str) or pattern.fullmatch(text) is None:
        raise HostFileError(f"{path}:{line}: expected a {what}, found {text!r}")
    return text


def _integer(path: Path, line: int, what: str, text: Any, low: int) -> int:
    if isinstance(text, bool) or not re.fullmatch(r"\d{1,5}", str(text)) or not low <= int(text) <= 65535:
        raise HostFileError(f"{path}:{line}: expected a {what} from {low} to 65535, found {text!r}")
    return int(text)


def _yaml_entries(path: Path, text: str) -> list[_Entry]:
    r"""The entries of a list in YAML."""
    try:
        import yaml
    except ImportError as error:
        raise HostFileError(
            f"{path}: reading YAML needs PyYAML: pip install pyyaml; or write a line for each host into a .txt file"
        ) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # "\UFFFFFFFF" is no character
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise HostFileError(f"{path}:{line}: expected YAML, found {problem}") from error
    if isinstance(root, yaml.MappingNode) and _has_plain_keys(root):
        found = {key.value: value for key, value in root.value}
        if set(found) != {"hosts"}:
            raise HostFileError(
                f"{path}:{root.start_mark.line + 1}: expected a list under 'hosts', found the keys {sorted(found)}"
            )
        root = found["hosts"]
    if not isinstance(root, yaml.SequenceNode):
        line = 1 if root is None else root.start_mark.line + 1
        raise HostFileError(f"{path}:{line}: expected a list of hosts")
    entries = []
    for node in root.value:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            entries.append(_line_entry(path, line, node.value))
        elif (
            isinstance(node, yaml.MappingNode)
            and _has_plain_keys(node)
            and all(isinstance(v, yaml.ScalarNode) for _, v in node.value)
        ):
            entries.append(_mapping_entry(path, line, {key.value: value.value for key, value in node.value}))
        else:
            raise HostFileError(f"{path}:{line}: expected a host, or a mapping with its address")
    return entries


def _has_plain_keys(node: Any) -> bool:
    r"""Whether all keys are words: written out, one that is a list of lists of aliases would be endless."""
    return all(isinstance(key.value, str) for key, _ in node.value)


def _mapping_entry(path: Path, line: int, given: dict[str, str]) -> _Entry:
    known = ("address", "user", "ssh_port", "port", "id", "interface")
    if "address" not in given or set(given) - set(known):
        raise HostFileError(
            f"{path}:{line}: expected address and, if wanted, {', '.join(known[1:])}; found {', '.join(given)}"
        )
    _check_address(path, line, given["address"])
    host = Host(
        given["address"],
        _matching(path, line, "user", given["user"], _USER) if "user" in given else None,
        _integer(path, line, "ssh_port", given["ssh_port"], 1) if "ssh_port" in given else None,
        _integer(path, line, "port", given["port"], _WORKER_PORTS) if "port" in given else None,
        _matching(path, line, "interface", given["interface"], _INTERFACE) if "interface" in given else None,
    )
    if "id" in given:
        return _Entry(line, host, _integer(path, line, "id", given["id"], 0), is_id=True)
    return _Entry(line, host)
