r"""Epochs shown as they pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tqdm import tqdm

_LINES = 10


class Progress:
    r"""Epochs to go through, shown on standard error: by a bar in a terminal, elsewhere, such as in the log of a job, by
    about ten lines in all.

    Args:
        first: Number of the first epoch.
        last: Number of the last.
        shown: Whether this rank shows anything.
    """

    def __init__(self, first: int, last: int, shown: bool) -> None:
        self._last = last
        # None draws a bar in terminals only.
        self._bar = tqdm(range(first, last + 1), desc="training", unit="epoch", disable=None if shown else True, leave=False)
        self._lines = shown and self._bar.disable

    def __iter__(self) -> Iterator[int]:
        yield from self._bar

    def tell(self, epoch: int, **facts: str) -> None:
        r"""Shows what an epoch reached."""
        self._bar.set_postfix(facts)
        if self._lines and (epoch % max(1, self._last // _LINES) == 0 or epoch == self._last):
            told = ", ".join(f"{name} {value}" for name, value in facts.items())
            print(f"epoch {epoch} of {self._last}: {told}", file=sys.stderr, flush=True)

    def close(self) -> None:
        r"""Takes the bar away."""
        self._bar.close()
