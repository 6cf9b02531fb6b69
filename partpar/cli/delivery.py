r"""Brings files to one host so that they appear there whole or not at all.

They are sent into a hidden folder beside their place, their checksums are computed at the far end, and only then are
they renamed. What arrived before a failure stays in the hidden folder, and the next try sends the rest.

The far end needs a POSIX shell and coreutils. Everything that varies is handed to the scripts below as arguments.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from partpar.cli.hosts import Host
from partpar.cli.ssh import RemoteCommandError, Runner, Ssh, checked

# $1 hidden folder, $2 place, then names: makes the hidden folder and says what the far end has and holds.
LOOK = (
    's=$1 f=$2; shift 2; for n do mkdir -p -- "$(dirname -- "$s/$n")" || exit 73; done; '
    "if command -v rsync >/dev/null; then echo has rsync; fi; "
    'df -Pk -- "$s" | tail -n 1 | sed "s/^/df /"; '
    'for n do if [ -f "$s/$n" ]; then sha256sum -- "$s/$n" | sed "s/ .*//;s/^/staged /;s|$| $n|"; fi; done; '
    'for n do if [ -f "$f/$n" ]; then sha256sum -- "$f/$n" | sed "s/ .*//;s/^/there /;s|$| $n|"; fi; done; '
    'if [ -d "$f" ]; then ls -A -- "$f" | sed "s/^/entry /"; fi'
)
# Checksums on standard input; then the hidden folder takes the place of what is there.
PUBLISH_FOLDER = (
    's=$1 f=$2; (cd -- "$s" && sha256sum --check --quiet --strict -) || exit 65; sync -f -- "$s" || exit; '
    'if [ -e "$f" ]; then rm -rf -- "$s.old" && mv -- "$f" "$s.old" || exit; fi; '
    'mv -T -- "$s" "$f" || { [ ! -e "$s.old" ] || mv -- "$s.old" "$f"; exit 1; }; '
    'rm -rf -- "${s%-*}"-*'  # what was replaced, and leftovers of other tries
)
# Checksums on standard input; then every file takes its place.
PUBLISH_FILES = (
    's=$1 f=$2; shift 2; (cd -- "$s" && sha256sum --check --quiet --strict -) || exit 65; sync -f -- "$s" || exit; '
    'for n do mkdir -p -- "$(dirname -- "$f/$n")" && mv -f -- "$s/$n" "$f/$n" || exit; done; rm -rf -- "$s"'
)
DISCARD = 'rm -rf -- "$1"'
FREE = 'df -Pk -- "$1" | tail -n 1 | sed "s/^/df /"'

_CANNOT_MAKE, _DAMAGED = 73, 65  # exit codes of the scripts
_NEARLY_NONE = 1 << 16  # bytes left of a disk that is full
_NAME = re.compile(r"[^\x00-\x1f\\|&\"]+")  # what the scripts and sha256sum can hold in a line


@dataclass(frozen=True)
class Item:
    r"""A file to bring: where it is here, its name below the place there, its size and SHA-256."""

    source: Path
    name: str
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if PurePosixPath(self.name).is_absolute() or ".." in PurePosixPath(self.name).parts:
            raise RemoteCommandError(f"{self.name}: expected a name below the workspace")
        if _NAME.fullmatch(self.name) is None:
            raise RemoteCommandError(
                f"{self.name!r}: expected a name without quotes, \\, |, & and control characters"
            )


@dataclass(frozen=True)
class Parcel:
    r"""Files that belong together.

    Args:
        place: The folder at the far end.
        items: What to bring into it.
        is_folder: Whether the place shall hold just these, such as a partition; otherwise they stand beside others.
        identity: Name of the item whose equality means that what stands at the place may be replaced.
    """

    place: PurePosixPath
    items: tuple[Item, ...]
    is_folder: bool
    identity: str | None = None

    @property
    def hidden(self) -> PurePosixPath:
        r"""Where the files arrive: another folder for other files, so that none is left from an earlier try."""
        sums = hashlib.sha256("".join(item.sha256 + item.name for item in self.items).encode()).hexdigest()
        name = f".{self.place.name}-arriving-{sums[:12]}"
        return self.place.parent / name if self.is_folder else self.place / name


@dataclass(frozen=True)
class Receipt:
    r"""What one delivery did."""

    num_files: int
    num_bytes: int
    sent_bytes: int
    by: str
    seconds: float


@dataclass
class Delivery:
    r"""Deliveries to one host.

    Args:
        host: It.
        ssh: How to reach it.
        runner: Runs the commands.
        use_rsync: Whether this machine has rsync.
        progress: Is told how many bytes of the parcel have arrived.
    """

    host: Host
    ssh: Ssh
    runner: Runner
    use_rsync: bool
    progress: Callable[[int], None] = lambda arrived: None

    def look(self, parcel: Parcel) -> list[str]:
        names = [item.name for item in parcel.items]
        return self._script(LOOK, str(parcel.hidden), str(parcel.place), *names)

    def publish(self, parcel: Parcel) -> list[str]:
        script, names = (
            (PUBLISH_FOLDER, []) if parcel.is_folder else (PUBLISH_FILES, [i.name for i in parcel.items])
        )
        return self._script(script, str(parcel.hidden), str(parcel.place), *names)

    def sends(self, parcel: Parcel, items: Sequence[Item], rsync: bool) -> list[list[str]]:
        r"""The commands that send files: one for each folder that they lie in."""
        folders: dict[str, list[str]] = {}
        for item in items:
            folders.setdefault(str(PurePosixPath(item.name).parent), []).append(str(item.source.resolve()))
        return [self._send(parcel.hidden / folder, sources, rsync) for folder, sources in folders.items()]

    def deliver(self, parcel: Parcel, overwrite: bool = False) -> Receipt:
        r"""Brings a parcel, unless it is there.

        Raises:
            RemoteCommandError: If it did not arrive; the place is then as it was.
        """
        begin = time.monotonic()
        whole = sum(item.num_bytes for item in parcel.items)
        found = self._look(parcel)
        if all(found.there.get(item.name) == item.sha256 for item in parcel.items) and (
            not parcel.is_folder or found.entries == {item.name for item in parcel.items}
        ):
            self._run(self._script(DISCARD, str(parcel.hidden)), parcel, "removing an empty folder")
            self.progress(whole)
            return Receipt(len(parcel.items), whole, 0, "there already", time.monotonic() - begin)
        self._check_replaceable(parcel, found, overwrite)

        missing = [item for item in parcel.items if found.staged.get(item.name) != item.sha256]
        needed = sum(item.num_bytes for item in missing)
        if found.free is not None and found.free < needed:
            raise self._full(parcel, needed, found.free)
        rsync = self.use_rsync and found.rsync
        arrived = whole - needed
        self.progress(arrived)
        for words in self.sends(parcel, missing, rsync):
            self._run(words, parcel, "sending", needed, _Percent(arrived, self.progress))
        sums = "".join(f"{item.sha256}  {item.name}\n" for item in parcel.items)
        self._run(self.publish(parcel), parcel, "checking what arrived", needed, stdin=sums)
        self.progress(whole)
        return Receipt(
            len(parcel.items), whole, needed, "rsync" if rsync else "scp", time.monotonic() - begin
        )

    def _look(self, parcel: Parcel) -> _Found:
        return _Found.read(self._run(self.look(parcel), parcel, "looking at the workspace"))

    def _check_replaceable(self, parcel: Parcel, found: _Found, overwrite: bool) -> None:
        if not parcel.is_folder or not found.entries or overwrite:
            return
        same = [i for i in parcel.items if i.name == parcel.identity and found.there.get(i.name) == i.sha256]
        if not same:
            self._run(self._script(DISCARD, str(parcel.hidden)), parcel, "removing an empty folder")
            raise RemoteCommandError(
                f"{self.host.label}: {parcel.place}: expected no partition or this very one, found another; "
                "pass --overwrite to replace it, or another --rel-data-path"
            )

    def _send(self, folder: PurePosixPath, sources: list[str], rsync: bool) -> list[str]:
        host = self.host
        target = f"{'' if host.user is None else host.user + '@'}{host.bracketed}:{folder}/"
        if rsync:
            # What lies there with the right size and time may be damaged, so nothing is skipped for these.
            options = [
                "--copy-links",
                "--partial",
                "--ignore-times",
                "--protect-args",
                "--no-h",
                "--info=progress2",
            ]
            return ["rsync", *options, "-e", shlex.join(self.ssh.program(host)), "--", *sources, target]
        port = [] if host.ssh_port is None else ["-P", str(host.ssh_port)]
        return ["scp", "-q", *self.ssh.options(), *port, "--", *sources, target]

    def _script(self, script: str, *arguments: str) -> list[str]:
        return self.ssh.command(self.host, ["sh", "-c", script, "partpar", *arguments])

    def _run(
        self,
        words: list[str],
        parcel: Parcel,
        doing: str,
        needed: int = 0,
        on_output: Callable[[bytes], None] | None = None,
        stdin: str = "",
    ) -> str:
        result = self.runner.run(words, stdin, on_output)
        code, out, err = result
        if code == 0:
            return out
        label = self.host.label
        if code == _CANNOT_MAKE:
            said = err.strip().splitlines()
            raise RemoteCommandError(
                f"{label}: {parcel.place}: could not make the folder: {said[-1] if said else 'without a word'}; mend its "
                "rights or choose another --workspace"
            )
        if code == _DAMAGED:
            raise RemoteCommandError(
                f"{label}: {parcel.place}: what arrived is not what the manifest says: {' / '.join(out.split(chr(10))[:3])}; "
                "check the partition here with partpar verify, then copy again"
            )
        free = self._free(parcel) if needed else None
        if "No space left on device" in err or (free is not None and free < min(needed, _NEARLY_NONE)):
            raise self._full(parcel, needed, free or 0)
        checked(self.host, result, doing)
        raise AssertionError("checked() raises where the exit code is not 0")

    def _free(self, parcel: Parcel) -> int | None:
        code, out, _ = self.runner.run(self._script(FREE, str(parcel.hidden)))
        return _Found.read(out).free if code == 0 else None

    def _full(self, parcel: Parcel, needed: int, free: int) -> RemoteCommandError:
        return RemoteCommandError(
            f"{self.host.label}: {parcel.place}: the disk is full: {needed:,} bytes were to come, {free:,} are free; "
            "make room or choose another --workspace, then run the same command again"
        )


@dataclass(frozen=True)
class _Found:
    r"""What the far end said."""

    rsync: bool
    free: int | None
    staged: dict[str, str]
    there: dict[str, str]
    entries: set[str]

    @classmethod
    def read(cls, text: str) -> _Found:
        sums: dict[str, dict[str, str]] = {"staged": {}, "there": {}}
        entries, rsync, free = set(), False, None
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            if kind in sums:
                digest, _, name = rest.partition(" ")
                sums[kind][name] = digest
            elif kind == "entry":
                entries.add(rest)
            elif kind == "has":
                rsync = True
            elif kind == "df":  # file system, blocks of 1024 bytes, used, available, …
                numbers = re.findall(r"\s(\d+)(?=\s)", rest)
                free = int(numbers[2]) * 1024 if len(numbers) > 2 else None
        return cls(rsync, free, sums["staged"], sums["there"], entries)


class _Percent:
    r"""Reads ``rsync --info=progress2``, and tells how many bytes there are beside those that were there before."""

    def __init__(self, before: int, tell: Callable[[int], None]) -> None:
        self._before = before
        self._tell = tell
        self._rest = b""

    def __call__(self, piece: bytes) -> None:
        *lines, self._rest = re.split(rb"[\r\n]", self._rest + piece)
        for line in lines:
            match = re.match(rb"\s*(\d[\d,]*)\s+\d+%", line)
            if match is not None:
                self._tell(self._before + int(match[1].replace(b",", b"")))
