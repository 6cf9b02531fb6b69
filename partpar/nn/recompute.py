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


class _Tape:
    """What the first run drew from, in order, for the second to repeat."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.replayed: int | None = None  # how many steps were read again; None in the first run


_tape: ContextVar[_Tape | None] = ContextVar("partpar_recompute", default=None)


def recomputing() -> bool:
    r"""Whether this is the second run of a layer."""
    tape = _tape.get()
    return tape is not None and tape.replayed is not None


def step_of(advance: Callable[[], int]) -> int:
    r"""The step that a counter-based draw belongs to: :obj:`advance` gives it in a first run, a second repeats it."""
    tape = _tape.get()
    if tape is None:
        return advance()
    if tape.replayed is None:
        tape.steps.append(advance())
        return tape.steps[-1]
    tape.replayed += 1
    return tape.steps[tape.replayed - 1]


def run_again(function: Callable[..., Any], *args: Any) -> Any:
    r"""Calls ``function(*args)`` and keeps only its arguments for the backward pass."""
    tape = _Tape()

    @contextmanager
    def first() -> Iterator[None]:
        token = _tape.set(tape)
        try:
            yield
        finally:
            _tape.reset(token)

    @contextmanager
    def second() -> Iterator[None]:
        token, tape.replayed = _tape.set(tape), 0
        try:
            yield
        finally:
            _tape.reset(token)
            tape.replayed = None

    # To its end on every rank: one that stopped early would miss an exchange.
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (first(), second()))
