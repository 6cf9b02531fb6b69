r"""Summing the gradients of one step at the owner of their rows."""

from __future__ import annotations

import numpy as np

from partpar.kernels.sparse_update import forget_slots, scale_sums
from partpar.kernels.table import sum_by_row
from partpar.sharded.shard import Shard
from partpar.sharded.swap import Brought


class Gradients:
    r"""Sums for the rows that were touched; buffers are kept from step to step.

    Args:
        shard: The rows that gradients are for.
    """

    def __init__(self, shard: Shard) -> None:
        self._name = shard.name
        self._slot_of = np.zeros(len(shard.rows), np.int32)
        self._sums = np.empty((0, shard.rows.size(1)), shard.rows.numpy().dtype)
        self._touched = self._counts = np.empty(0, np.int32)
        self.num_touched = 0

    @property
    def touched(self) -> np.ndarray:
        r"""``[num_touched]``, the rows in the order of their first gradient."""
        return self._touched[: self.num_touched]

    @property
    def sums(self) -> np.ndarray:
        r"""``[num_touched, C]``"""
        return self._sums[: self.num_touched]

    def add(self, brought: Brought) -> None:
        r"""Adds gradients, one after the other."""
        room = self.num_touched + len(brought.rows)
        if len(self._sums) < room:
            room = max(room, len(self._sums) * 3 // 2)
            for name in ("_sums", "_touched", "_counts"):
                old = getattr(self, name)
                new = np.empty((room, *old.shape[1:]), old.dtype)
                new[: self.num_touched] = old[: self.num_touched]
                setattr(self, name, new)
        self.num_touched = sum_by_row(
            brought.rows, brought.values, brought.at, self._slot_of, self._touched, self._sums, self._counts,
            self.num_touched,
        )  # fmt: skip
        assert self.num_touched >= 0, f"{self._name}: a rank named a row that is not here"

    def finish(self, scale: float, mean: bool) -> None:
        r"""Scales the sums; for a mean, each is divided by how many gradients it has."""
        if mean or scale != 1.0:
            factor = self._sums.dtype.type(scale)
            scale_sums(0, self.num_touched, self._sums, self._counts, mean, factor)

    def forget(self) -> None:
        r"""Makes ready for the next step."""
        forget_slots(self._touched, self.num_touched, self._slot_of)
        self.num_touched = 0
