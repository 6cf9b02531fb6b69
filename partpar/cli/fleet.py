r"""One process for each host, whose output is told apart; all end together."""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from partpar.cli.keep import BEAT

_STOPPING = 20.0  # seconds that the far ends get to end their processes; they need 10
_POLL = 0.1
_TAIL = 40  # last lines of standard error that are kept, to tell what went wrong


@dataclass
class Member:
    r"""The process of one host.

    Args:
        label: How its output is told apart.
        command: Its words.
        output: Where its standard output goes; its standard error goes where ours does.
    """

    label: str
    command: Sequence[str]
    output: IO[str]
    process: subprocess.Popen[bytes] = field(init=False)
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_TAIL))
    _readers: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        # A session of its own: Ctrl-C is for us, who end it in order.
        self.process = subprocess.Popen(  # noqa: S603  # a list of words that we made
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for source, target, tail in (
            (self.process.stdout, self.output, None),
            (self.process.stderr, sys.stderr, self.tail),
        ):
            assert source is not None
            reader = threading.Thread(target=_copy, args=(source, target, self.label, tail), daemon=True)
            reader.start()
            self._readers.append(reader)

    def beat(self) -> None:
        r"""Tells the far end that we are there."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def release(self) -> None:
        r"""Lets the far end go: it ends all it started."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def join_output(self) -> None:
        for reader in self._readers:
            reader.join(5)


def run_fleet(members: Sequence[Member]) -> Member | None:
    r"""Runs all until all have ended well or one has not; then ends the rest and waits for them.

    Returns:
        The first that failed, or :obj:`None`.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after all were ended. A second one ends the connections at once.
    """
    started: list[Member] = []
    try:
        for member in members:
            member.start()
            started.append(member)
        return _until_the_end(started)
    finally:
        _stop(started)


def _until_the_end(members: Sequence[Member]) -> Member | None:
    last_beat = float("-inf")
    while True:
        codes = [member.process.poll() for member in members]
        for member, code in zip(members, codes, strict=True):
            if code not in (None, 0):
                return member
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() - last_beat > BEAT:
            last_beat = time.monotonic()
            for member, code in zip(members, codes, strict=True):
                if code is None:
                    member.beat()
        time.sleep(_POLL)


def _stop(members: Sequence[Member]) -> None:
    for member in members:
        member.release()
    deadline = time.monotonic() + _STOPPING
    try:
        for member in members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for member in members:
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait()
            member.join_output()


_printing = threading.Lock()


def _copy(source: IO[bytes], target: IO[str], label: str, tail: collections.deque[str] | None) -> None:
    r"""Copies lines behind their host's name. Of a line that rewrites itself, such as a progress bar, a terminal
    shows every state and a file the last."""
    live = target.isatty()
    for line, is_whole in _lines(source):
        if tail is not None and is_whole:
            tail.append(line)
        if is_whole or live:
            with _printing:
                target.write(
                    f"\r[{label}] {line}" + ("\n" if is_whole else "") if live else f"[{label}] {line}\n"
                )
                target.flush()


def _lines(source: IO[bytes]) -> Iterator[tuple[str, bool]]:
    r"""Lines without their ends, and whether each is whole or will be overwritten."""
    rest = b""
    while piece := source.read1(1 << 16):  # type: ignore[attr-defined]
        *ended, rest = re.split(rb"(\r?\n|\r(?!\n))", rest + piece)
        for text, end in zip(ended[::2], ended[1::2], strict=True):
            yield text.decode(errors="replace"), end != b"\r"
    if rest:
        yield rest.decode(errors="replace"), True
