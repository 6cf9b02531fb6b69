r"""The phases of a cut, as a bar on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from partpar.partition.phases import PHASES, listening


@contextmanager
def shown_phases() -> Iterator[None]:
    r"""Shows what a cut within the block is doing; where nobody watches, a line with its time for each phase."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with _lines(console):
            yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("begin", total=len(PHASES))

        def show(phase: str, done: int, of: int) -> None:
            share = f" {done + 1} of {of}" if of else ""
            progress.update(task, description=phase + share, completed=PHASES.index(phase) + (done / of if of else 0))

        with listening(show):
            yield


@contextmanager
def _lines(console: Console) -> Iterator[None]:
    current, begin = "", time.perf_counter()

    def end() -> None:
        if current:
            console.print(f"{current}: {time.perf_counter() - begin:.1f} s", highlight=False)

    def show(phase: str, done: int, of: int) -> None:
        nonlocal current, begin
        if phase != current:
            end()
            current, begin = phase, time.perf_counter()

    with listening(show):
        yield
    end()
