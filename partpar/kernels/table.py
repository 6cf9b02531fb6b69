r"""Compiled loops over a table of rows that are named by id: who owns an id, fetching rows and putting them.

Rows are moved as words (see :func:`words`), so that one loop serves every dtype. All loops check the rows they are
given and return the place of the first that is outside, or -1: they come from callers and from other workers.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from partpar.kernels.prefetch import prefetch

# How many rows ahead a row is asked for, and how many words of eight bytes a cache line has.
AHEAD, LINE = 8, 8


def word_of(row_bytes: int) -> type[np.unsignedinteger]:
    r"""The widest word that divides a row."""
    return np.uint64 if row_bytes % 8 == 0 else np.uint32 if row_bytes % 4 == 0 else np.uint8


def words(rows: Tensor) -> np.ndarray:
    r"""A view of contiguous rows ``[n, *]`` that begin at a multiple of eight bytes, as ``[n, k]`` words."""
    columns = rows.shape[1:].numel()
    flat = rows.view(rows.size(0), columns).view(torch.uint8).numpy()
    return flat.view(word_of(columns * rows.element_size()))


@njit(nogil=True, cache=True)
def place_ids(
    ids: np.ndarray, offsets: np.ndarray, rank: int, order: np.ndarray, local: np.ndarray, counts: np.ndarray
) -> int:
    r"""Sorts ids by owner, stably, those of :obj:`rank` itself last.

    Args:
        ids: ``[n]`` integers.
        offsets: int64 ``[num_parts + 1]``; part p owns ids ``offsets[p]`` to ``offsets[p + 1] - 1``.
        rank: The part to put last.
        order: ``[n]``, the place in :obj:`ids` of each sorted id.
        local: ``[n]``, the row of each sorted id at its owner.
        counts: int64 ``[num_parts]``, ids of each owner.

    Returns:
        The place of the first id that nobody owns, or -1.
    """
    num_parts = offsets.shape[0] - 1
    total = offsets[num_parts]
    owners = np.empty(ids.shape[0], np.int32)
    counts[:] = 0
    for i in range(ids.shape[0]):
        number = np.int64(ids[i])
        if number < 0 or number >= total:
            return i
        low, high = 0, num_parts
        while high - low > 1:
            middle = (low + high) // 2
            if offsets[middle] <= number:
                low = middle
            else:
                high = middle
        owners[i] = low
        counts[low] += 1
    at = np.empty(num_parts, np.int64)
    run = 0
    for part in range(num_parts):
        if part != rank:
            at[part] = run
            run += counts[part]
    at[rank] = run
    for i in range(ids.shape[0]):
        owner = owners[i]
        order[at[owner]] = i
        local[at[owner]] = ids[i] - offsets[owner]
        at[owner] += 1
    return -1


@njit(nogil=True, cache=True)
def fetch_rows(table: np.ndarray, rows: np.ndarray, out: np.ndarray, at: np.ndarray) -> int:
    r"""``out[at[i]] = table[rows[i]]``"""
    num, width = table.shape
    flat = table.reshape(-1)
    last = rows.shape[0] - 1
    for i in range(rows.shape[0]):
        ahead = np.int64(rows[min(i + AHEAD, last)]) * width
        for c in range(0, width, LINE):
            prefetch(flat, ahead + c)
        row, place = rows[i], at[i]
        if row < 0 or row >= num:
            return i
        for c in range(width):
            out[place, c] = table[row, c]
    return -1


@njit(nogil=True, cache=True)
def put_rows(table: np.ndarray, rows: np.ndarray, values: np.ndarray, at: np.ndarray) -> int:
    r"""``table[rows[i]] = values[at[i]]``; of equal rows the last one stays."""
    num, width = table.shape
    for i in range(rows.shape[0]):
        row, place = rows[i], at[i]
        if row < 0 or row >= num:
            return i
        for c in range(width):
            table[row, c] = values[place, c]
    return -1
