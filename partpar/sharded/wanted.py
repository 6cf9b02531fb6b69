r"""Which rows a worker wants of whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from partpar.errors import IdError
from partpar.kernels.whole_rows import first_outside
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
    given, num_parts = ids.numpy(), shard.policy.num_parts
    wrong = first_outside(given, shard.policy.num_rows)
    if wrong >= 0:
        raise IdError(
            f"{shard.name}: expected ids from 0 to {shard.policy.num_rows - 1}, found {int(given[wrong])} at place {wrong}"
        )
    owners = np.searchsorted(shard.offsets, given, side="right") - 1
    places = np.where(owners == shard.rank, num_parts, owners).astype(np.min_scalar_type(num_parts))
    order = np.argsort(places, kind="stable")  # of small numbers: by radix
    local = (given - shard.offsets[owners]).astype(shard.id_dtype)[order]
    return Wanted(order, local, np.bincount(owners, minlength=num_parts), shard.rank)


def nothing(shard: Shard) -> Wanted:
    r"""Not a single row."""
    empty = np.empty(0, np.int64)
    return Wanted(empty, empty.astype(shard.id_dtype), np.zeros(shard.policy.num_parts, np.int64), shard.rank)
