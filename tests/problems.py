r"""Problems of partitioning, generated and real, and how well they are solved."""

import numpy as np
from graphs import load_npz_graph

from partpar.partition.problem import Array, ArrayEdges, Problem

STAR = np.stack([np.zeros(99, dtype=np.int64), np.arange(1, 100)])


def planted(num_nodes: int = 2000, num_edges: int = 12000, num_groups: int = 8, seed: int = 0) -> Array:
    r"""Directed communities over shuffled ids, with self-loops, duplicates, and 50 isolated nodes."""
    generator = np.random.default_rng(seed)
    ids = generator.permutation(num_nodes)[50:]
    src = generator.integers(0, ids.size, num_edges)
    inside = generator.random(num_edges) < 0.9
    jump = generator.integers(0, ids.size // num_groups, num_edges) * num_groups
    dst = np.where(
        inside,
        (src + jump) % (ids.size // num_groups * num_groups),
        generator.integers(0, ids.size, num_edges),
    )
    edge_index = ids[np.stack([src, dst])]
    edge_index[:, :20] = edge_index[:, 20:40]
    edge_index[1, 40:60] = edge_index[0, 40:60]
    return edge_index


def problem(
    edge_index: Array,
    num_nodes: int,
    num_parts: int,
    weights: dict[str, Array] | None = None,
    seed: int = 0,
    edge_weight: Array | None = None,
) -> Problem:
    return Problem(num_nodes, ArrayEdges(np.asarray(edge_index), edge_weight), num_parts, weights or {}, seed)


def real(name: str, num_parts: int) -> Problem:
    data = load_npz_graph(name)
    return problem(data.edge_index.numpy(), data.num_nodes, num_parts)


def cut_share(p: Problem, assignment: Array) -> float:
    crossing = sum(int((assignment[src] != assignment[dst]).sum()) for src, dst, _ in p.edges.chunks())
    return crossing / p.edges.num_edges


def imbalance(weight: Array, assignment: Array, num_parts: int) -> float:
    loads = np.bincount(assignment, weights=weight, minlength=num_parts)
    return loads.max() / loads.mean()
