r"""Summing the gradients of one step at the owner of their rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from partpar.kernels.whole_rows import fetch_rows, first_outside, whole
from partpar.sharded.shard import Shard
from partpar.sharded.swap import Brought
from partpar.sharded.wire import give, take


class Gradients:
    r"""Sums for the rows that a step touches.

    Args:
        shard: The rows that gradients are for.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.touched = np.empty(0, np.int64)  #: ``[n]``, rows that have gradients, each once
        self._values = shard.rows[:0]
        self._buffers: list[Tensor] = []
        # For each row touched the place of its sum among the values, and how many gradients that is of.
        self._at = self._counts = self.touched

    def add(self, brought: Sequence[Brought]) -> None:
        r"""Adds gradients, one after the other."""
        before, rows = len(self.touched), np.concatenate([self.touched, *(some.rows for some in brought)])
        assert first_outside(rows, len(self._shard.rows)) < 0, f"{self._shard.name}: a rank named a row that is not here"
        buffer = take(len(rows) * self._shard.row_bytes)
        values = buffer.view(self._shard.rows.dtype).view(len(rows), self._shard.rows.size(1))
        # Sorted by row, and for each row by place: its first value comes to hold its sum.
        bits = len(rows).bit_length()
        keys = np.sort(rows.astype(np.int64) << bits | np.arange(len(rows)))
        rows, at = keys >> bits, keys & (1 << bits) - 1
        counts = np.concatenate([self._counts, np.ones(len(rows) - before, np.int64)])
        new = np.diff(rows, prepend=-1) != 0

        into, ends = whole(values), before + np.cumsum([len(some.rows) for some in brought])
        fetch_rows(whole(self._values), self._at, into[:before])
        for some, end in sorted(zip(brought, ends.tolist(), strict=True), key=lambda pair: pair[0].flight is not None):
            some.copy(into[end - len(some.rows) : end])  # those that are here already go first
        self.done()

        firsts, others = at[new], at[~new]
        if len(others):
            sums = firsts[np.cumsum(new)[~new] - 1]
            values.index_add_(0, torch.from_numpy(sums), values[torch.from_numpy(others)])  # one after the other
            np.add.at(counts, sums, counts[others])
        self.touched, self._at, self._counts = rows[new], firsts, counts[firsts]
        self._values = values
        self._buffers.append(buffer)

    def sums(self, some: slice, out: Tensor, scale: float, mean: bool) -> None:
        r"""Writes to :obj:`out` ``[n, C]`` the sums of some of the rows touched, scaled; for a mean, each is divided by how
        many gradients it has."""
        torch.index_select(self._values, 0, torch.from_numpy(self._at[some]), out=out)
        if mean:
            out *= torch.from_numpy(scale / self._counts[some]).to(out.dtype).unsqueeze(1)
        elif scale != 1.0:
            out *= scale

    def done(self) -> None:
        r"""Sums are not needed any more."""
        while self._buffers:
            give(self._buffers.pop())
