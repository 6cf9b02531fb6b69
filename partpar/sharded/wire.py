r"""How rows lie in the buffers that are exchanged: for each rank, for each tensor, a block of bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.sharded.shard import Shard
from partpar.sharded.wanted import Wanted

_MOST_BUFFERS = 8

_free: list[Tensor] = []
_lock = threading.Lock()  # tensors of different groups may be used from different threads


def take(num_bytes: int) -> Tensor:
    """uint8 ``[num_bytes]``, of memory that was used before where there is some: fresh pages halve gloo's speed."""
    with _lock:
        for i, buffer in enumerate(_free):
            if buffer.numel() >= num_bytes:
                return _free.pop(i)[:num_bytes]
    return torch.empty(max(num_bytes + num_bytes // 4, 1 << 16), dtype=torch.uint8)[:num_bytes]


def give(buffer: Tensor) -> None:
    r"""Takes a buffer back."""
    storage = buffer.untyped_storage()
    with _lock:
        _free.append(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)))  # type: ignore[call-overload]
        if len(_free) > _MOST_BUFFERS:
            _free.pop(0)


def starts_of(counts: np.ndarray, shards: Sequence[Shard]) -> tuple[np.ndarray, list[int]]:
    """Where the block of each (rank, tensor) begins in a buffer of rows, and the bytes of each rank's blocks."""
    sizes = counts * np.array([shard.row_bytes for shard in shards])
    ends = sizes.cumsum().reshape(sizes.shape)
    return ends - sizes, sizes.sum(1).tolist()


def block(buffer: np.ndarray, start: int, num_rows: int, row_bytes: int) -> np.ndarray:
    """A block of whole rows in a buffer of bytes, ``[num_rows]``."""
    return buffer[start : start + num_rows * row_bytes].view(f"V{row_bytes}")


def away(counts: np.ndarray, rank: int) -> np.ndarray:
    """Counts of what travels."""
    counts = counts.copy()
    counts[rank] = 0
    return counts


def id_blocks(wanted: Sequence[Wanted], part: int) -> list[np.ndarray]:
    """The rows of a part that are named, tensor after tensor."""
    return [w.local[w.block(part)] for w in wanted]


def send_ids(
    wanted: Sequence[Wanted], dtype: np.dtype, asked: np.ndarray, heard: np.ndarray, group: ProcessGroup
) -> exchange.RowsInFlight:
    r"""Begins telling each rank which of its rows this one names.

    Args:
        wanted: For each tensor.
        dtype: In which they travel.
        asked: int64 ``[num_parts, num_tensors]``, rows of each rank that this one names.
        heard: The same the other way.
        group: An own group.
    """
    blocks = [ids for part in np.flatnonzero(asked.any(1)).tolist() for ids in id_blocks(wanted, part)]
    ids = np.concatenate([np.empty(0, dtype), *blocks]).astype(dtype, copy=False)
    return exchange.send_rows(torch.from_numpy(ids), asked.sum(1).tolist(), heard.sum(1).tolist(), group)
