r"""One worker's rows of a tensor, and the names by which workers find what belongs together."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar.agreement import digest
from partpar.kernels.whole_rows import whole
from partpar.sharded.policy import PartPolicy


@dataclass(eq=False)
class Shard:
    r"""The rows that this worker keeps.

    Args:
        name: Of the tensor.
        rows: ``[num_local, *]``, contiguous, in host memory.
        policy: Which worker keeps which rows.
        rank: Of this worker.
    """

    name: str
    rows: Tensor
    policy: PartPolicy
    rank: int
    offsets: np.ndarray = field(init=False, repr=False)
    whole: np.ndarray = field(init=False, repr=False)
    label: int = field(init=False, repr=False)
    row_bytes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.offsets, self.whole = np.array(self.policy.offsets, np.int64), whole(self.rows)
        self.row_bytes = self.rows.shape[1:].numel() * self.rows.element_size()
        self.label = digest(self.name, *self.rows.shape[1:], self.rows.dtype, *self.policy.offsets)

    @property
    def shape(self) -> torch.Size:
        r"""Of the whole tensor."""
        return torch.Size((self.policy.num_rows, *self.rows.shape[1:]))

    @property
    def first_id(self) -> int:
        return self.policy.offsets[self.rank]

    @property
    def id_dtype(self) -> type[np.signedinteger]:
        r"""What a row's number within a shard fits, on every worker."""
        return np.int32 if int(np.diff(self.offsets).max()) < 2**31 else np.int64


class Names:
    r"""The shards of one process group by name. They live as long as somebody uses them, or here if they are to stay.

    A name that nobody gives is numbered; every rank makes its tensors in the same order, so numbers agree.
    """

    def __init__(self) -> None:
        self._used: WeakValueDictionary[str, Shard] = WeakValueDictionary()
        self._stay: dict[str, Shard] = {}
        self._given = 0

    def next_name(self) -> str:
        self._given += 1
        return f"tensor {self._given}"

    def get(self, name: str) -> Shard | None:
        return self._used.get(name)

    def put(self, shard: Shard, persistent: bool) -> None:
        self._used[shard.name] = shard
        if persistent:
            self._stay[shard.name] = shard

    def all(self) -> list[str]:
        return sorted(self._used)


_names: WeakKeyDictionary[ProcessGroup, Names] = WeakKeyDictionary()
_alone = Names()


def names(group: ProcessGroup | None) -> Names:
    r"""The names of an own group; :obj:`None` when alone."""
    if group is None:
        return _alone
    if group not in _names:
        _names[group] = Names()
    return _names[group]
