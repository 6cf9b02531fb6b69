r"""Hot loops of Linear Deterministic Greedy: one pass over a block of nodes, and the order they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(nogil=True, cache=True)
def ldg_pass(
    first: int,
    indptr: Array,
    neighbours: Array,
    edge_weights: Array,
    node_weights: Array,
    capacity: Array,
    parts: Array,
    loads: Array,
) -> int:
    r"""Places the nodes of one block, in turn, each in the part where (weight of edges to neighbours there) *
    (1 - fill of its fullest constraint) is largest and no capacity is exceeded.

    Args:
        first: The first node of the block.
        indptr: int64 ``[nodes in block + 1]``, positions in ``neighbours`` from ``indptr[0]`` on.
        neighbours: ``[entries in block]``.
        edge_weights: float ``[entries in block]``, or empty: every entry weighs 1.
        node_weights: float64 ``[num_nodes, num_constraints]``.
        capacity: float64 ``[num_constraints]``.
        parts: int32 ``[num_nodes]``, -1 where not yet placed; updated in place.
        loads: float64 ``[num_parts, num_constraints]`` of this pass; updated in place.

    Returns:
        How many nodes changed their part.
    """
    num_parts, num_constraints = loads.shape
    pull = np.zeros(num_parts)
    touched = np.empty(num_parts, dtype=np.int64)
    moved = 0
    for row in range(indptr.size - 1):
        node = first + row
        num_touched = 0
        for entry in range(indptr[row] - indptr[0], indptr[row + 1] - indptr[0]):
            part = parts[neighbours[entry]]
            weight = edge_weights[entry] if edge_weights.size else 1.0
            if part >= 0 and weight > 0:
                if pull[part] == 0.0:
                    touched[num_touched] = part
                    num_touched += 1
                pull[part] += weight
        best, best_score = -1, 0.0
        for i in range(num_touched):
            part = touched[i]
            fill, fits = 0.0, True
            for c in range(num_constraints):
                fill = max(fill, loads[part, c] / capacity[c])
                # A part that is full in one constraint still takes nodes that weigh nothing there.
                fits = fits and (
                    node_weights[node, c] == 0 or loads[part, c] + node_weights[node, c] <= capacity[c]
                )
            score = pull[part] * max(1.0 - fill, 1e-9)
            pull[part] = 0.0
            if fits and (score > best_score or (score == best_score and best >= 0 and part < best)):
                best, best_score = part, score
        if best < 0:
            best = _lightest(node_weights[node], capacity, loads)
        for c in range(num_constraints):
            loads[best, c] += node_weights[node, c]
        moved += parts[node] != best
        parts[node] = best
    return moved


@njit(nogil=True, cache=True)
def _lightest(weight: Array, capacity: Array, loads: Array) -> int:
    r"""The part that would be least full with a node of this weight; of equals, the least full without it."""
    num_parts, num_constraints = loads.shape
    best, best_fill, best_rest = 0, np.inf, np.inf
    for part in range(num_parts):
        fill, rest = 0.0, 0.0
        for c in range(num_constraints):
            fill = max(fill, (loads[part, c] + weight[c]) / capacity[c])
            rest += loads[part, c] / capacity[c]
        if fill < best_fill or (fill == best_fill and rest < best_rest):
            best, best_fill, best_rest = part, fill, rest
    return best


@njit(nogil=True, cache=True)
def visit_breadth_first(
    indptr: Array, neighbours: Array, order: Array, seen: Array, state: Array, budget: int
) -> bool:
    r"""Goes on with a breadth-first visit of all components, lowest unseen node first, until it has read
    ``budget`` entries; returns whether it is done.

    Args:
        indptr: int64 ``[num_nodes + 1]``.
        neighbours: ``[num_entries]``.
        order: ``[num_nodes]``, the nodes visited so far, which is also the queue.
        seen: bool ``[num_nodes]``.
        state: int64 ``[3]``: head and tail of the queue, and the next node to start a component from.
        budget: Entries to read before returning.
    """
    head, tail, start = state[0], state[1], state[2]
    num_nodes = order.size
    while head < num_nodes and budget > 0:
        if head == tail:
            while seen[start]:
                start += 1
            seen[start] = True
            order[tail] = start
            tail += 1
        node = order[head]
        head += 1
        budget -= indptr[node + 1] - indptr[node]
        for entry in range(indptr[node], indptr[node + 1]):
            other = neighbours[entry]
            if not seen[other]:
                seen[other] = True
                order[tail] = other
                tail += 1
    state[0], state[1], state[2] = head, tail, start
    return bool(head == num_nodes)


@njit(nogil=True, cache=True)
def scatter_entries(
    bounds: Array,
    cursor: Array,
    rows: Array,
    neighbours: Array,
    weights: Array,
    src: Array,
    dst: Array,
    weight: Array,
) -> None:
    r"""Sorts a chunk's entries (both directions of each edge, no self-loops) by the block that their row lies
    in, keeping their order within a block.

    Args:
        bounds: int64 ``[num_blocks + 1]``, first rows of the blocks.
        cursor: int64 ``[num_blocks + 1]``; out: entries of block ``b`` end at ``cursor[b]``.
        rows, neighbours: ``[2 * edges]``, out; ``weights`` the same, or empty.
        src, dst, weight: The chunk; ``weight`` is empty where edges weigh 1.
    """
    cursor[:] = 0
    for edge in range(src.size):
        if src[edge] != dst[edge]:
            cursor[np.searchsorted(bounds, src[edge], side="right")] += 1
            cursor[np.searchsorted(bounds, dst[edge], side="right")] += 1
    for block in range(1, cursor.size):
        cursor[block] += cursor[block - 1]
    # cursor[b] is now the number of entries in blocks before b: block b's first free place.
    for edge in range(src.size):
        if src[edge] != dst[edge]:
            for direction in range(2):
                row = src[edge] if direction == 0 else dst[edge]
                other = dst[edge] if direction == 0 else src[edge]
                block = np.searchsorted(bounds, row, side="right") - 1
                place = cursor[block]
                rows[place] = row
                neighbours[place] = other
                if weights.size:
                    weights[place] = weight[edge]
                cursor[block] += 1


@njit(nogil=True, cache=True)
def place_entries(
    cursor: Array,
    first: int,
    rows: Array,
    entries: Array,
    entry_weights: Array,
    neighbours: Array,
    weights: Array,
) -> None:
    r"""Places a block's scattered entries by row: entry ``i`` goes to ``cursor[rows[i] - first]``, which
    moves on."""
    for i in range(rows.size):
        place = cursor[rows[i] - first]
        cursor[rows[i] - first] = place + 1
        neighbours[place] = entries[i]
        if weights.size:
            weights[place] = entry_weights[i]
