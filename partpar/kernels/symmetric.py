r"""Hot loops of the symmetric copy of a graph: both directions of each edge, chunk by chunk, then merged row
by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True)
def count_entries(counts: Array, src: Array, dst: Array) -> None:
    r"""Adds to ``counts[v]`` the edges that touch ``v``, self-loops left out."""
    for edge in range(src.size):
        if src[edge] != dst[edge]:
            counts[src[edge]] += 1
            counts[dst[edge]] += 1


@njit(nogil=True, cache=True)
def fill_entries(cursor: Array, neighbours: Array, src: Array, dst: Array) -> None:
    r"""Writes each edge into the rows of both its ends, at ``cursor[v]``, which moves on."""
    for edge in range(src.size):
        a, b = src[edge], dst[edge]
        if a != b:
            neighbours[cursor[a]] = b
            cursor[a] += 1
            neighbours[cursor[b]] = a
            cursor[b] += 1


@njit(nogil=True, cache=True)
def fill_weighted_entries(
    cursor: Array, neighbours: Array, weights: Array, src: Array, dst: Array, weight: Array
) -> None:
    r"""As :func:`fill_entries`, with the edge's weight beside each entry."""
    for edge in range(src.size):
        a, b = src[edge], dst[edge]
        if a != b:
            neighbours[cursor[a]] = b
            weights[cursor[a]] = weight[edge]
            cursor[a] += 1
            neighbours[cursor[b]] = a
            weights[cursor[b]] = weight[edge]
            cursor[b] += 1


@njit(nogil=True, cache=True)
def sort_rows(indptr: Array, neighbours: Array) -> int:
    r"""Sorts each row in place; returns how many entries are distinct."""
    distinct = 0
    for row in range(indptr.size - 1):
        begin, end = indptr[row], indptr[row + 1]
        neighbours[begin:end].sort()
        for entry in range(begin, end):
            if entry == begin or neighbours[entry - 1] != neighbours[entry]:
                distinct += 1
    return distinct


@njit(nogil=True, cache=True)
def merge_rows(indptr: Array, neighbours: Array, times: Array) -> None:
    r"""Keeps one of equal neighbours of a row, in place, and how often it stood there in ``times`` (unless
    empty). ``indptr`` is rewritten for the shorter rows."""
    write = 0
    begin = indptr[0]
    for row in range(indptr.size - 1):
        end = indptr[row + 1]
        start = write
        for entry in range(begin, end):
            if write == start or neighbours[write - 1] != neighbours[entry]:
                neighbours[write] = neighbours[entry]
                if times.size:
                    times[write] = 0
                write += 1
            if times.size:
                times[write - 1] += 1
        begin = end
        indptr[row + 1] = write


@njit(nogil=True, cache=True)
def merge_weighted_rows(indptr: Array, neighbours: Array, weights: Array) -> None:
    r"""Sorts each row and sums the weights of equal neighbours, in place. Sums run in the order in which
    entries were written, which is that of raw edges."""
    write = 0
    begin = indptr[0]
    for row in range(indptr.size - 1):
        end = indptr[row + 1]
        order = np.argsort(neighbours[begin:end], kind="mergesort")
        columns, values = neighbours[begin:end][order], weights[begin:end][order]
        start = write
        for entry in range(columns.size):
            if write == start or neighbours[write - 1] != columns[entry]:
                neighbours[write] = columns[entry]
                weights[write] = 0
                write += 1
            weights[write - 1] += values[entry]
        begin = end
        indptr[row + 1] = write
