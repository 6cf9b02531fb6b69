r"""The log of a run: JSON lines and TensorBoard scalars, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partpar.training.metrics import JsonLines
from partpar.training.scalars import Scalars


class RunLog:
    r"""Writes records to a file of JSON lines, and numbers of epochs to TensorBoard too; rank 0 writes.

    Args:
        metrics: The file, see :class:`JsonLines`; :obj:`None` writes none.
        logdir: Folder of TensorBoard events, see :class:`Scalars`; :obj:`None` writes none.
        rank: Of this worker.

    Raises:
        ScalarsError: If a folder is named and there is no TensorBoard.
    """

    def __init__(self, metrics: str | Path | None = None, logdir: str | Path | None = None, rank: int = 0) -> None:
        self._lines, self._scalars = JsonLines(metrics, rank), Scalars(logdir, rank)

    def write(self, **record: Any) -> None:
        r"""Appends a record; if it has an ``epoch``, its other numbers are scalars of that step. Several seeds make
        several curves."""
        self._lines.write(**record)
        if "epoch" not in record:
            return
        numbers = {name: value for name, value in record.items() if name not in ("epoch", "seed")}
        prefix = f"seed {record['seed']}/" if "seed" in record else ""
        known = {prefix + name: value for name, value in numbers.items() if isinstance(value, (int, float))}
        self._scalars.write(record["epoch"], **known)
