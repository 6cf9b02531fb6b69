r"""What a cut is doing, told to whoever listens, such as a command that shows progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

ASSIGN = "assign nodes to parts"  # not entered where the partition stands already
PHASES = ("check the graph", "compute its digest", ASSIGN, "write shares", "publish")
Listener = Callable[[str, int, int], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def enter(phase: str, done: int = 0, of: int = 0) -> None:
    r"""Says that a phase begins, or how much of it is done."""
    assert phase in PHASES, phase
    listener = _listener.get()
    if listener is not None:
        listener(phase, done, of)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    r"""Calls ``listener(phase, done, of)`` within the block; ``of`` is 0 where a phase has no parts."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
