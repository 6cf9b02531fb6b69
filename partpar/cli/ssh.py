r"""Commands on other machines over OpenSSH: their words, and what their failures mean.

Host keys, users, keys, ports and proxies are whatever ssh is configured to; nothing is loosened here. Words for the
far end are quoted, because ssh hands one string to a shell there; on this side every command is a list of words.
"""

from __future__ import annotations

import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from partpar.cli.hosts import Host
from partpar.errors import PartparError

SSH_FAILED = 255  # ssh's exit code for failures of its own
# The end of a connection that nobody closed is noticed after 15 seconds.
_OPTIONS = ("BatchMode=yes", "ServerAliveInterval=5", "ServerAliveCountMax=3")


class RemoteCommandError(PartparError, RuntimeError):
    r"""A command on another machine failed; the message names the host and the remedy."""


@dataclass(frozen=True)
class Ssh:
    r"""How to reach hosts.

    Args:
        config: A configuration file for ssh instead of the user's own, or :obj:`None`.
        connect_timeout: Seconds until a host that does not answer is given up.
    """

    config: Path | None = None
    connect_timeout: int = 10

    def options(self) -> list[str]:
        r"""Options that ssh and scp share."""
        config = [] if self.config is None else ["-F", str(self.config)]
        settings = (*_OPTIONS, f"ConnectTimeout={self.connect_timeout}")
        return [*config, *(word for setting in settings for word in ("-o", setting))]

    def program(self, host: Host) -> list[str]:
        r"""ssh and its options, without the host."""
        return ["ssh", *self.options(), *([] if host.ssh_port is None else ["-p", str(host.ssh_port)])]

    def command(self, host: Host, words: Sequence[str]) -> list[str]:
        r"""The words that run a command on a host."""
        return [*self.program(host), "--", host.target, shlex.join(words)]


@dataclass
class Runner:
    r"""Runs commands, and can end all of them from another thread."""

    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(
        self, words: Sequence[str], stdin: str = "", on_output: Callable[[bytes], None] | None = None
    ) -> tuple[int, str, str]:
        r"""Runs a command and waits.

        Args:
            words: The command.
            stdin: What it reads.
            on_output: Is given standard output, piece by piece, instead of it being returned.

        Returns:
            Exit code, standard output, standard error.
        """
        with self._lock:
            if self._stopped:
                raise RemoteCommandError("stopped before all was done")
            process = subprocess.Popen(  # noqa: S603  # a list of words that we made
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            self._running.add(process)
        try:
            if on_output is None:
                out, err = process.communicate(stdin.encode())
                return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
            return self._stream(process, on_output)
        finally:
            with self._lock:
                self._running.discard(process)

    @staticmethod
    def _stream(process: subprocess.Popen[bytes], on_output: Callable[[bytes], None]) -> tuple[int, str, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        errors: list[bytes] = []
        stderr = process.stderr
        reader = threading.Thread(target=lambda: errors.extend(iter(lambda: stderr.read(4096), b"")))
        reader.start()
        while piece := process.stdout.read1(4096):  # type: ignore[attr-defined]
            on_output(piece)
        code = process.wait()
        reader.join()
        process.stdout.close()
        stderr.close()
        return code, "", b"".join(errors).decode(errors="replace")

    def stop(self) -> None:
        r"""Ends what runs, and lets nothing more begin."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def connection_problem(host: Host, stderr: str) -> str | None:
    r"""What to do about a failure of ssh itself, by what it said; :obj:`None` if it is none that we know.

    Returns:
        A message that begins with the host's label.
    """
    said = stderr.strip().splitlines()
    last = next((line for line in reversed(said) if line.strip()), "")
    for sign, meaning in _PROBLEMS.items():
        if sign in stderr:
            return (
                f"{host.label}: {meaning.format(target=host.target, address=host.address)} (ssh said: {last})"
            )
    return None


_PROBLEMS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "its key is another than ssh knows; find out why, then remove the old one with: ssh-keygen -R {address}"
    ),
    "Host key verification failed": (
        "ssh does not know its key; connect once by hand to check and accept it: ssh {target}"
    ),
    "Permission denied (": (
        "it let nobody in with the keys that ssh offered; add yours with: ssh-copy-id {target}, or name the right one in "
        "ssh's configuration"
    ),
    "Could not resolve hostname": "no such name; mend the hosts file or /etc/hosts",
    "Connection refused": "nothing listens at its ssh port; start sshd there, or write ADDRESS:SSH_PORT in the hosts file",
    "Connection timed out": "it does not answer; check that it is up and that no firewall is in between",
    "timed out": "it does not answer; check that it is up and that no firewall is in between",
    "No route to host": "no way leads to it; check the address and the network",
    "Network is unreachable": "no way leads to it; check the address and the network",
    "Bad configuration option": "ssh does not understand its configuration; mend the file",
    "Can't open user config file": "ssh found no such configuration; mend --ssh-config",
}


def checked(host: Host, result: tuple[int, str, str], doing: str) -> str:
    r"""Standard output of a command that must have succeeded.

    Raises:
        RemoteCommandError: If it failed.
    """
    code, out, err = result
    if code == 0:
        return out
    known = connection_problem(host, err) if code == SSH_FAILED else None
    if known is not None:
        raise RemoteCommandError(known)
    said = err.strip().splitlines()
    raise RemoteCommandError(
        f"{host.label}: {doing} failed with exit code {code}: {' / '.join(said[-3:]) or 'without a word'}"
    )
