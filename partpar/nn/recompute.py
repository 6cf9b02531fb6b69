r"""Gradient checkpointing that knows routes: a layer is run again in the backward pass instead of being remembered.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, by :mod:`torch.utils.checkpoint`. The second run
exchanges and aggregates again, on all ranks alike; it draws the same dropout and leaves running statistics alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Tape:
    r"""What the first run drew from, in order, for the second and those that follow to repeat. Where runs are nested,
    the first run of an inner one may be part of an outer one's second, and then repeats that."""

    def __init__(self) -> None:
        self.outer = _tape.get()
        self.steps: list[int] = []
        self.replayed: int | None = None  # how many steps were read again; None in the first run

    def step(self, advance: Callable[[], int]) -> int:
        if self.replayed is None:
            self.steps.append(advance() if self.outer is None else self.outer.step(advance))
            return self.steps[-1]
        self.replayed += 1
        return self.steps[self.replayed - 1]

    @contextmanager
    def first(self) -> Iterator[None]:
        token = _tape.set(self)
        try:
            yield
        finally:
            _tape.reset(token)

    @contextmanager
    def again(self) -> Iterator[None]:
        self.replayed = 0
        try:
            with self.first():
                yield
        finally:
            self.replayed = None


_tape: ContextVar[Tape | None] = ContextVar("partpar_recompute", default=None)


def recomputing() -> bool:
    r"""Whether this is the second run of a layer."""
    tape = _tape.get()
    while tape is not None:
        if tape.replayed is not None:
            return True
        tape = tape.outer
    return False


def step_of(advance: Callable[[], int]) -> int:
    r"""The step that a counter-based draw belongs to: :obj:`advance` gives it in a first run, a second repeats it."""
    tape = _tape.get()
    return advance() if tape is None else tape.step(advance)


def run_again(function: Callable[..., Any], *args: Any) -> Any:
    r"""Calls ``function(*args)`` and keeps only its arguments for the backward pass. Calls may be nested."""
    tape = Tape()
    # To its end on every rank: one that stopped early would miss an exchange.
    with set_checkpoint_early_stop(False):
        return checkpoint(
            function, *args, use_reentrant=False, context_fn=lambda: (tape.first(), tape.again())
        )
