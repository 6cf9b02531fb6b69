r"""Neighbour sampling on edges grouped by destination: one hop, for a batch of rows.

First :func:`windows` or one of its temporal kin says which edges of a row may be drawn, as a range of positions.
Then a ``draw_*`` function picks positions in each range. Every draw is a function of the row's 64-bit stream and of
how many were drawn for that row before, so nothing depends on the order, the number or the company of rows: a row
whose edges stand in the same order anywhere is drawn alike everywhere.

All functions are compiled, release the GIL and work on numpy arrays. ``lo`` and ``hi`` are int64 ``[n]``, the ranges;
``streams`` is uint64 ``[n]``; the result is ``(positions [m] int64, counts [n] int64)``.
"""

import math

import numpy as np
from numba import njit

from partpar.kernels.counter import absorb, draw
from partpar.kernels.prefetch import prefetch

_LOW_32 = np.uint64(0xFFFFFFFF)
_32, _11 = np.uint64(32), np.uint64(11)
# Up to so many picks, looking through them is cheaper than marking what was taken.
_FEW = 32
# How many edges ahead memory is asked for.
_AHEAD = 12

Drawn = tuple[np.ndarray, np.ndarray]


@njit(inline="always")
def below(bits: np.uint64, size: int) -> np.int64:
    """A number in ``0..size-1`` for sizes below 2**32, from the upper half of the bits (Lemire, 2019)."""
    return np.int64(((bits >> _32) * np.uint64(size)) >> _32)


@njit(inline="always")
def unit(bits: np.uint64) -> float:
    """A number in ``(0, 1]``."""
    return (float(bits >> _11) + 1.0) * 2.0**-53


# --- streams and ranges ---------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def streams_of(key: np.uint64, raw_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The stream of each row: of the request's key and the destination's raw id."""
    out = np.empty(rows.shape[0], np.uint64)
    for i in range(rows.shape[0]):
        prefetch(raw_ids, rows[min(i + _AHEAD, rows.shape[0] - 1)])
        out[i] = absorb(key, np.uint64(raw_ids[rows[i]]))
    return out


@njit(nogil=True, cache=True)
def split_streams(streams: np.ndarray, words: np.ndarray) -> None:
    """Takes one more word into each stream, such as the seed that a row is sampled for."""
    for i in range(streams.shape[0]):
        streams[i] = absorb(streams[i], np.uint64(words[i]))


@njit(nogil=True, cache=True)
def windows(indptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All edges of each row."""
    lo, hi = np.empty(rows.shape[0], np.int64), np.empty(rows.shape[0], np.int64)
    for i in range(rows.shape[0]):
        prefetch(indptr, rows[min(i + _AHEAD, rows.shape[0] - 1)])
        lo[i], hi[i] = indptr[rows[i]], indptr[rows[i] + 1]
    return lo, hi


@njit(nogil=True, cache=True)
def shrink_to_time(lo: np.ndarray, hi: np.ndarray, sorted_times: np.ndarray, times: np.ndarray) -> None:
    """Cuts each range behind the last edge that is not later than the row's time; times rise within a range."""
    for i in range(lo.shape[0]):
        low, high = lo[i], hi[i]
        while low < high:
            middle = (low + high) // 2
            if sorted_times[middle] <= times[i]:
                low = middle + 1
            else:
                high = middle
        hi[i] = low


@njit(nogil=True, cache=True)
def shrink_to_last(lo: np.ndarray, hi: np.ndarray, fanout: int) -> None:
    """Keeps the last ``fanout`` positions of each range."""
    for i in range(lo.shape[0]):
        lo[i] = max(lo[i], hi[i] - fanout)


# --- draws ----------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def draw_all(lo: np.ndarray, hi: np.ndarray) -> Drawn:
    """Every position, in order."""
    counts = np.empty(lo.shape[0], np.int64)
    total = 0
    for i in range(lo.shape[0]):
        counts[i] = hi[i] - lo[i]
        total += counts[i]
    positions = np.empty(total, np.int64)
    at = 0
    for i in range(lo.shape[0]):
        for position in range(lo[i], hi[i]):
            positions[at] = position
            at += 1
    return positions, counts


@njit(nogil=True, cache=True)
def draw_uniform(lo: np.ndarray, hi: np.ndarray, streams: np.ndarray, fanout: int) -> Drawn:
    """Without replacement, each set alike (Floyd; Bentley, "Programming pearls: a sample of brilliance", 1987)."""
    counts = np.empty(lo.shape[0], np.int64)
    total, longest = 0, 0
    for i in range(lo.shape[0]):
        counts[i] = min(hi[i] - lo[i], fanout)
        total += counts[i]
        longest = max(longest, hi[i] - lo[i])
    positions = np.empty(total, np.int64)
    taken = np.zeros(longest if fanout > _FEW else 0, np.bool_)
    at = 0
    for i in range(lo.shape[0]):
        size = hi[i] - lo[i]
        if size <= fanout:
            for position in range(lo[i], hi[i]):
                positions[at] = position
                at += 1
            continue
        first = at
        for last in range(size - fanout, size):
            pick = below(draw(streams[i], np.uint64(at - first)), last + 1)
            if fanout > _FEW:
                seen = taken[pick]
            else:
                seen = False
                for j in range(first, at):
                    seen |= positions[j] == lo[i] + pick
            if seen:
                pick = last
            if fanout > _FEW:
                taken[pick] = True
            positions[at] = lo[i] + pick
            at += 1
        if fanout > _FEW:
            for j in range(first, at):
                taken[positions[j] - lo[i]] = False
    return positions, counts


@njit(nogil=True, cache=True)
def draw_uniform_again(lo: np.ndarray, hi: np.ndarray, streams: np.ndarray, fanout: int) -> Drawn:
    """With replacement: ``fanout`` positions wherever there is any."""
    counts = np.empty(lo.shape[0], np.int64)
    total = 0
    for i in range(lo.shape[0]):
        counts[i] = fanout if hi[i] > lo[i] else 0
        total += counts[i]
    positions = np.empty(total, np.int64)
    at = 0
    for i in range(lo.shape[0]):
        for j in range(counts[i]):
            positions[at] = lo[i] + below(draw(streams[i], np.uint64(j)), hi[i] - lo[i])
            at += 1
    return positions, counts


@njit(nogil=True, cache=True)
def draw_weighted(
    lo: np.ndarray, hi: np.ndarray, streams: np.ndarray, fanout: int, order: np.ndarray, weights: np.ndarray
) -> Drawn:
    """Without replacement, one after the other with chances proportional to the weights left (A-Res:
    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006). Weights are looked up by
    ``order[position]``, or by position where ``order`` is empty; what weighs nothing is never drawn."""
    counts = np.empty(lo.shape[0], np.int64)
    total = 0
    for i in range(lo.shape[0]):
        total += min(hi[i] - lo[i], fanout)
    positions = np.empty(total, np.int64)
    waits = np.empty(max(fanout, 0), np.float64)  # a max-heap: the longest wait among the picks is on top
    at = 0
    for i in range(lo.shape[0]):
        found = 0
        for position in range(lo[i], hi[i]):
            weight = float(weights[order[position] if order.shape[0] else position])
            if not weight > 0.0:
                continue
            wait = -math.log(unit(draw(streams[i], np.uint64(position - lo[i])))) / weight
            if found < fanout:
                hole, found = found, found + 1
                while hole > 0 and waits[(hole - 1) // 2] < wait:
                    waits[hole], positions[at + hole] = (
                        waits[(hole - 1) // 2],
                        positions[at + (hole - 1) // 2],
                    )
                    hole = (hole - 1) // 2
            elif found > 0 and wait < waits[0]:
                hole = 0
                while True:
                    child = 2 * hole + 1
                    if child + 1 < found and waits[child + 1] > waits[child]:
                        child += 1
                    if child >= found or waits[child] <= wait:
                        break
                    waits[hole], positions[at + hole] = waits[child], positions[at + child]
                    hole = child
            else:
                continue
            waits[hole], positions[at + hole] = wait, position
        positions[at : at + found].sort()  # a heap's order says nothing
        counts[i] = found
        at += found
    return positions[:at], counts


@njit(nogil=True, cache=True)
def draw_weighted_again(
    lo: np.ndarray, hi: np.ndarray, streams: np.ndarray, fanout: int, order: np.ndarray, weights: np.ndarray
) -> Drawn:
    """With replacement, chances proportional to the weights; see :func:`draw_weighted`."""
    longest = 0
    for i in range(lo.shape[0]):
        longest = max(longest, hi[i] - lo[i])
    upto = np.empty(longest, np.float64)
    counts = np.empty(lo.shape[0], np.int64)
    positions = np.empty(lo.shape[0] * fanout, np.int64)
    at = 0
    for i in range(lo.shape[0]):
        size = hi[i] - lo[i]
        sum_of_weights = 0.0
        for j in range(size):
            sum_of_weights += float(weights[order[lo[i] + j] if order.shape[0] else lo[i] + j])
            upto[j] = sum_of_weights
        counts[i] = fanout if sum_of_weights > 0.0 else 0
        for j in range(counts[i]):
            # In (0, sum]: the first sum that reaches it belongs to an edge that weighs something.
            target = unit(draw(streams[i], np.uint64(j))) * sum_of_weights
            low, high = 0, size - 1
            while low < high:
                middle = (low + high) // 2
                if upto[middle] < target:
                    low = middle + 1
                else:
                    high = middle
            positions[at] = lo[i] + low
            at += 1
    return positions[:at], counts


@njit(nogil=True, cache=True)
def reorder(positions: np.ndarray, order: np.ndarray) -> None:
    """Positions among the edges in an order become positions among the edges themselves."""
    for i in range(positions.shape[0]):
        positions[i] = order[positions[i]]


@njit(nogil=True, cache=True)
def gather(
    positions: np.ndarray,
    indices: np.ndarray,
    first: int,
    halo_ids: np.ndarray,
    raw_ids: np.ndarray,
    edge_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and raw ids of the neighbours, and raw ids of the edges, at drawn positions. Sources are the owned nodes,
    whose ids follow each other from ``first`` on, then the halo."""
    m, num_owned = positions.shape[0], raw_ids.shape[0] - halo_ids.shape[0]
    out = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int64)
    for i in range(m):
        far, near = positions[min(i + 2 * _AHEAD, m - 1)], positions[min(i + _AHEAD, m - 1)]
        prefetch(indices, far)
        prefetch(edge_ids, far)
        prefetch(raw_ids, indices[near])
        edge = positions[i]
        row = np.int64(indices[edge])
        out[0][i] = first + row if row < num_owned else halo_ids[row - num_owned]
        out[1][i], out[2][i] = raw_ids[row], edge_ids[edge]
    return out
