r"""Which rows a worker wants of whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from partpar.errors import IdError
from partpar.kernels.table import place_ids
from partpar.sharded.shard import Shard


@dataclass(frozen=True)
class Wanted:
    r"""Ids by owner: those of other ranks in rank order, then this rank's own.

    Args:
        order: ``[n]``, the place of each among the ids given.
        local: ``[n]``, its row at the owner.
        counts: int64 ``[num_parts]``.
    """

    order: np.ndarray
    local: np.ndarray
    counts: np.ndarray
    rank: int

    @property
    def num_away(self) -> int:
        return len(self.order) - int(self.counts[self.rank])

    def block(self, part: int) -> slice:
        r"""Where the ids of a part are."""
        if part == self.rank:
            return slice(self.num_away, len(self.order))
        start = int(self.counts[:part].sum()) - (int(self.counts[self.rank]) if self.rank < part else 0)
        return slice(start, start + int(self.counts[part]))


def want(shard: Shard, ids: Tensor) -> Wanted:
    r"""Finds the owners of ids.

    Raises:
        IdError: With the first id that nobody owns.
    """
    given = ids.numpy()
    order, local = np.empty(len(given), np.int64), np.empty(len(given), shard.id_dtype)
    counts = np.empty(shard.policy.num_parts, np.int64)
    wrong = place_ids(given, shard.offsets, shard.rank, order, local, counts)
    if wrong >= 0:
        raise IdError(
            f"{shard.name}: expected ids from 0 to {shard.policy.num_rows - 1}, found {int(given[wrong])} at place {wrong}"
        )
    return Wanted(order, local, counts, shard.rank)


def nothing(shard: Shard) -> Wanted:
    r"""Not a single row."""
    empty = np.empty(0, np.int64)
    return Wanted(empty, empty.astype(shard.id_dtype), np.zeros(shard.policy.num_parts, np.int64), shard.rank)
