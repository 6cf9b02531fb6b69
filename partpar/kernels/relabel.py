r"""Numbering ids in the order in which they are first seen, by a hash table and without sorting.

A table is int64 ``[size, 2]``, size a power of two and at least twice the ids in it: the id (-1: free) and its number.
Ids may belong to groups, such as the trees of different seeds; the same id is numbered in each group apart. Group g's
ids are kept as ``g * stride + id``.
"""

import numpy as np
from numba import njit

from partpar.kernels.counter import mix
from partpar.kernels.prefetch import prefetch

_AHEAD = 8


def table_size(capacity: int) -> int:
    r"""How many rows a table for so many ids has."""
    return 1 << max(4, (2 * capacity - 1).bit_length())


def new_table(capacity: int) -> np.ndarray:
    r"""A free table for so many ids."""
    return np.full((table_size(capacity), 2), -1, dtype=np.int64)


@njit(inline="always")
def _slot(table: np.ndarray, key: int) -> int:
    mask = table.shape[0] - 1
    slot = np.int64(mix(np.uint64(key))) & mask
    while table[slot, 0] != -1 and table[slot, 0] != key:
        slot = (slot + 1) & mask
    return slot


@njit(nogil=True, cache=True)
def copy_table(old: np.ndarray, new: np.ndarray) -> None:
    """Enters into a larger table what is in another."""
    for i in range(old.shape[0]):
        if old[i, 0] != -1:
            slot = _slot(new, old[i, 0])
            new[slot, 0], new[slot, 1] = old[i, 0], old[i, 1]


@njit(nogil=True, cache=True)
def number_seeds(table: np.ndarray, keys: np.ndarray) -> None:
    """Numbers ids ``0, 1, …`` by their positions; what stands there twice keeps its first."""
    for i in range(keys.shape[0]):
        slot = _slot(table, keys[i])
        if table[slot, 0] == -1:
            table[slot, 0], table[slot, 1] = keys[i], i


@njit(nogil=True, cache=True)
def number_neighbours(
    table: np.ndarray,
    known: int,
    ids: np.ndarray,
    counts: np.ndarray,
    groups: np.ndarray,
    stride: int,
    first: int,
    rows: np.ndarray,
    cols: np.ndarray,
    new_at: np.ndarray,
) -> int:
    """Numbers ragged rows of ids, new ones from ``known`` on.

    Args:
        ids: int64 ``[m]``; row i's are the next ``counts[i]``.
        groups: int64, the group of each row, or empty where there are none.
        first: Number of the first row.
        rows: int64 ``[m]``, told the number of each id.
        cols: int64 ``[m]``, told the number of the row that it stands in.
        new_at: int64 ``[m]``, told where each new id was first seen.

    Returns:
        How many are new.
    """
    flat, mask, last = table.reshape(-1), table.shape[0] - 1, ids.shape[0] - 1
    new, at = 0, 0
    for i in range(counts.shape[0]):
        base = groups[i] * stride if groups.shape[0] else 0
        for _ in range(counts[i]):
            # Of the same row most likely; a hint that misses costs nothing.
            prefetch(flat, 2 * (np.int64(mix(np.uint64(base + ids[min(at + _AHEAD, last)]))) & mask))
            key = base + ids[at]
            slot = _slot(table, key)
            if table[slot, 0] == -1:
                table[slot, 0], table[slot, 1] = key, known + new
                new_at[new] = at
                new += 1
            rows[at], cols[at] = table[slot, 1], first + i
            at += 1
    return new


@njit(nogil=True, cache=True)
def find_neighbours(
    table: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    groups: np.ndarray,
    stride: int,
    rows: np.ndarray,
    cols: np.ndarray,
    kept_at: np.ndarray,
) -> int:
    """As :func:`number_neighbours`, but keeps only the ids that have a number already.

    Returns:
        How many those are: so many of ``rows``, ``cols`` and of ``kept_at``, where they stood, are told.
    """
    kept, at = 0, 0
    for i in range(counts.shape[0]):
        base = groups[i] * stride if groups.shape[0] else 0
        for _ in range(counts[i]):
            slot = _slot(table, base + ids[at])
            if table[slot, 0] != -1:
                rows[kept], cols[kept], kept_at[kept] = table[slot, 1], i, at
                kept += 1
            at += 1
    return kept


@njit(nogil=True, cache=True)
def contains(ids: np.ndarray, counts: np.ndarray, wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whether ``wanted[j]`` is among the ids of the ragged row ``rows[j]``."""
    starts = np.zeros(counts.shape[0] + 1, np.int64)
    for i in range(counts.shape[0]):
        starts[i + 1] = starts[i] + counts[i]
    out = np.zeros(wanted.shape[0], np.bool_)
    for j in range(wanted.shape[0]):
        for at in range(starts[rows[j]], starts[rows[j] + 1]):
            if ids[at] == wanted[j]:
                out[j] = True
                break
    return out
