r"""Linear Deterministic Greedy: parts from a stream of nodes (Stanton & Kliot, KDD 2012), streamed several
times (Nishimura & Ugander, KDD 2013)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from partpar.errors import PartitionError
from partpar.kernels.ldg import ldg_pass
from partpar.partition.balance import best_possible
from partpar.partition.blocks import Blocks
from partpar.partition.problem import Array, Problem
from partpar.partition.registry import register

ORDERS = ("bfs", "natural", "random")


def _target(options: dict[str, Any]) -> float:
    return max(1.05, float(options.get("slack", 1.03)))


@register("ldg", "lgd", target=_target)
def ldg(
    problem: Problem,
    *,
    passes: int = 5,
    slack: float = 1.03,
    order: str = "bfs",
    memory_bytes: int = 128 * 2**20,
) -> NDArray[np.int32]:
    r"""Linear Deterministic Greedy with restreaming.

    Nodes come one by one; each goes where most of its neighbours are, discounted by how full that part is:
    the part p that maximises :math:`|N(v) \cap P_p| \, (1 - |P_p| / C)` with capacity :math:`C = \text{slack}
    \cdot \text{mean}`. Each further pass starts with empty parts, but knows where the pass before it put
    those nodes that have not come yet. Edges count in both directions, duplicates as often as they stand, or
    by their weight.

    Several node weights make several capacities, and the fullest counts. Where some nodes weigh nothing, the
    number of nodes is bounded too, at 1.5 of the mean, as else one part could take all of them. Nodes too
    heavy for the slack come first.

    Memory is a few words per node (8 bytes per weight and 24 more) plus ``memory_bytes`` at most: a larger
    adjacency is sorted through files in the temporary directory (``TMPDIR``), 8 to 24 bytes per edge and
    direction, and read back block by block. The result is the same.

    Args:
        problem: The graph.
        passes: How often the nodes are streamed.
        slack: How many times the mean a part may hold.
        order: ``"bfs"``: breadth-first, which cuts least and, where the adjacency is on disk, looks each row
            up there once; ``"natural"``: by id, which reads files front to back only; ``"random"``: by the
            seed.
        memory_bytes: The adjacency that may be held.

    Raises:
        PartitionError: If an option is out of its range.
    """
    if passes < 1 or slack < 1 or memory_bytes < 1:
        raise PartitionError(
            f"ldg needs passes >= 1, slack >= 1 and memory_bytes >= 1, "
            f"found {passes}, {slack} and {memory_bytes}"
        )
    if order not in ORDERS:
        raise PartitionError(f"order must be one of {', '.join(ORDERS)}, found {order!r}")
    weights = problem.weight_matrix()
    num_nodes, num_parts = problem.num_nodes, problem.num_parts
    capacity = np.array(
        [max(slack * w.mean() * num_nodes / num_parts, best_possible(w, num_parts)) for w in weights.T]
    )
    if (weights == 0).any():
        weights = np.column_stack([weights, np.ones(num_nodes)])
        capacity = np.append(capacity, max(1.5 * num_nodes / num_parts, 1.0))

    sequence = _heavy_first(_sequence(problem, order, memory_bytes), weights, capacity, slack)
    rank = None
    if sequence is not None:
        rank = np.empty(num_nodes, dtype=np.int64)
        rank[sequence] = np.arange(num_nodes)
        weights = weights[sequence]
    parts = np.full(num_nodes, -1, dtype=np.int32)
    with Blocks(problem.edges, num_nodes, rank, memory_bytes) as blocks:
        for _ in range(passes):
            loads = np.zeros((num_parts, capacity.size))
            moved = 0
            for block in blocks:
                moved += ldg_pass(
                    block.first,
                    block.indptr,
                    block.neighbours,
                    block.weights,
                    weights,
                    capacity,
                    parts,
                    loads,
                )
            if moved == 0:
                break
    return parts if rank is None else parts[rank]


def _sequence(problem: Problem, order: str, memory_bytes: int) -> Array | None:
    r"""The order in which nodes come; :obj:`None` is that of their ids."""
    if order == "natural":
        return None
    if order == "random":
        return np.random.Generator(np.random.Philox(problem.seed)).permutation(problem.num_nodes)
    with Blocks(problem.edges, problem.num_nodes, None, memory_bytes) as blocks:
        return blocks.breadth_first()


def _heavy_first(
    sequence: Array | None, weights: NDArray[np.float64], capacity: NDArray[np.float64], slack: float
) -> Array | None:
    r"""Moves nodes to the front, heaviest first, that may find no room in the end: those above the slack of a
    part. The lightest part always has room for all others."""
    room = capacity * (1 - 1 / slack) if slack > 1 else np.zeros_like(capacity)
    uneven = weights.max(axis=0) > weights.min(axis=0)
    excess = np.where(uneven & (capacity > 0), weights / capacity, 0.0).max(axis=1)
    heavy = np.asarray((uneven & (weights > np.maximum(room, np.median(weights, axis=0)))).any(axis=1))
    if not heavy.any():
        return sequence
    if sequence is None:
        sequence = np.arange(weights.shape[0])
    first = heavy[sequence]
    front = sequence[first]
    return np.concatenate([front[np.argsort(-excess[front], kind="stable")], sequence[~first]])
