r"""The phases of a cut, as a bar on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from partpar.partition.phases import ASSIGN, PHASES, Listener, listening


@contextmanager
def shown_phases() -> Iterator[set[str]]:
    r"""Shows what a cut within the block is doing; where nobody watches, a line with its time for each phase.

    Yields:
        The phases that were entered.
    """
    console, entered = Console(stderr=True), set[str]()
    with _bar(console) if console.is_terminal else _lines(console) as told:

        def show(phase: str, done: int, of: int) -> None:
            entered.add(phase)
            told(phase, done, of)

        with listening(show):
            yield entered


def say_if_kept(entered: set[str], folder: Path) -> None:
    r"""Says on standard error that a cut did nothing, if its phases show so."""
    if ASSIGN not in entered:
        print(f"partpar: already there, kept: {folder}", file=sys.stderr)


@contextmanager
def _bar(console: Console) -> Iterator[Listener]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("begin", total=len(PHASES))

        def show(phase: str, done: int, of: int) -> None:
            share = f" {done + 1} of {of}" if of else ""
            progress.update(task, description=phase + share, completed=PHASES.index(phase) + (done / of if of else 0))

        yield show


@contextmanager
def _lines(console: Console) -> Iterator[Listener]:
    current, begin = "", time.perf_counter()

    def end() -> None:
        if current:
            console.print(f"{current}: {time.perf_counter() - begin:.1f} s", highlight=False)

    def show(phase: str, done: int, of: int) -> None:
        nonlocal current, begin
        if phase != current:
            end()
            current, begin = phase, time.perf_counter()

    yield show
    end()
