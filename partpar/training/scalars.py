r"""Scalars of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partpar.errors import PartparError


class ScalarsError(PartparError, RuntimeError):
    r"""TensorBoard was asked for and is not installed."""


class Scalars:
    r"""Writes numbers as TensorBoard scalars; rank 0 writes, the others do not.

    Args:
        logdir: Folder of the events, made where absent; :obj:`None` writes nothing.
        rank: Of this worker.

    Raises:
        ScalarsError: If there is no TensorBoard; on every rank, before training.
    """

    def __init__(self, logdir: str | Path | None, rank: int = 0) -> None:
        self._writer: Any = None
        if logdir is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ScalarsError("--logdir needs TensorBoard, which is not installed: pip install tensorboard") from error
        if rank == 0:
            self._writer = SummaryWriter(str(logdir))

    def write(self, epoch: int, /, **numbers: float | None) -> None:
        r"""Writes each number of an epoch under its name; those that are NaN or :obj:`None` are left out."""
        if self._writer is None:
            return
        for name, value in numbers.items():
            if value is not None and value == value:
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
