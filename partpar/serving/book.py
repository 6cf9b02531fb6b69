r"""Partition books: which part owns an id."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RangeBook:
    r"""Owners by ranges: part p owns ids ``offsets[p]`` to ``offsets[p + 1] - 1``. As ``book[ids]`` it reads like a
    tensor that has the part of every id, and is not as long as the graph.

    Args:
        offsets: ``[num_parts + 1]`` int64.
        ids_of: From the ids it is asked for (raw ids) to those of the ranges; by default they are these.
    """

    def __init__(self, offsets: Tensor, ids_of: Callable[[Tensor], Tensor] | None = None) -> None:
        self.offsets, self.ids_of = offsets, ids_of

    def __getitem__(self, ids: Tensor) -> Tensor:
        ids = torch.as_tensor(ids)
        found = ids if self.ids_of is None else self.ids_of(ids.flatten()).view(ids.shape)
        return torch.searchsorted(self.offsets, found, right=True) - 1

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def numel(self) -> int:
        r"""Number of ids, as a tensor would say."""
        return len(self)

    def __repr__(self) -> str:
        return f"RangeBook({self.offsets.tolist()})"
