r"""Counting sort of edges by one of their ends: compression and transposition in linear time."""

import numpy as np
import torch
from numba import njit
from torch import Tensor


@njit(nogil=True, cache=True)
def _sort_by_key(keys: np.ndarray, ends: np.ndarray, order: np.ndarray) -> None:
    # `ends[k + 1]` arrives as the first position of key k and leaves as the position behind its last.
    for position in range(keys.shape[0]):
        slot = keys[position] + 1
        order[ends[slot]] = position
        ends[slot] += 1


@njit(nogil=True, cache=True)
def _expand(indptr: np.ndarray, rows: np.ndarray) -> None:
    for row in range(indptr.shape[0] - 1):
        for position in range(indptr[row], indptr[row + 1]):
            rows[position] = row


def index_dtype(count: int) -> torch.dtype:
    r"""The narrowest of int32 and int64 that counts to :obj:`count`."""
    return torch.int32 if count < 2**31 else torch.int64


def compress(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    r"""Sorts positions by key, stably.

    Args:
        keys (Tensor): int32 or int64 ``[E]``, each in ``0..num_keys-1`` (not checked).
        num_keys (int): The number of keys.

    Returns:
        ``indptr`` int64 ``[num_keys + 1]`` and ``order`` ``[E]`` (int32 where that suffices): the positions
        whose key is ``k`` are ``order[indptr[k]:indptr[k + 1]]``, ascending.
    """
    counts = (
        torch.bincount(keys, minlength=num_keys)
        if keys.numel()
        else keys.new_zeros(num_keys, dtype=torch.int64)
    )
    indptr = torch.zeros(num_keys + 1, dtype=torch.int64, device=keys.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    if keys.device.type != "cpu":
        return indptr, torch.sort(keys, stable=True).indices.to(index_dtype(keys.numel()))
    order = torch.empty(keys.numel(), dtype=index_dtype(keys.numel()))
    ends = torch.cat([indptr[:1], indptr[:-1]])
    _sort_by_key(keys.contiguous().numpy(), ends.numpy(), order.numpy())
    return indptr, order


def expand(indptr: Tensor, num_entries: int, dtype: torch.dtype = torch.int32) -> Tensor:
    r"""The row of each entry, ``[E]``: the opposite of compression."""
    if indptr.device.type != "cpu":
        rows = torch.arange(indptr.numel() - 1, dtype=dtype, device=indptr.device)
        return torch.repeat_interleave(rows, indptr.diff(), output_size=num_entries)
    rows = torch.empty(num_entries, dtype=dtype)
    _expand(indptr.numpy(), rows.numpy())
    return rows
