r"""Random parts: the yardstick for all other algorithms, and a fair way to deal nodes out where edges say
nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from partpar.partition.problem import Problem
from partpar.partition.registry import register


def deal(weights: NDArray[np.float64], num_parts: int, seed: int) -> NDArray[np.int32]:
    r"""Deals nodes out like cards: sorted by weight, in rounds of ``num_parts``, each round in random order.

    Sizes differ by one at most, the first weight's sums by about one of its heaviest nodes. Further weights
    break ties, so masks that exclude each other all come out even.

    Args:
        weights: ``[num_nodes, num_constraints]`` nonnegative numbers.
        num_parts: The number of parts.
        seed: Seeds a Philox generator, which gives the same numbers everywhere.
    """
    num_nodes = weights.shape[0]
    generator = np.random.Generator(np.random.Philox(seed))
    order = generator.permutation(num_nodes)
    varying = [column for column in weights.T if column.size and column.min() != column.max()]
    if varying:
        order = order[np.lexsort([-column[order] for column in reversed(varying)])]
    rounds = np.empty((-(-num_nodes // num_parts), num_parts), dtype=np.int32)
    rounds[:] = np.arange(num_parts, dtype=np.int32)
    if num_nodes:
        generator.permuted(rounds, axis=1, out=rounds)
    assignment = np.empty(num_nodes, dtype=np.int32)
    assignment[order] = rounds.reshape(-1)[:num_nodes]
    return assignment


@register("random")
def random(problem: Problem) -> NDArray[np.int32]:
    r"""Random parts of equal size, even in the first node weight and roughly so in others (:func:`deal`)."""
    return deal(problem.weight_matrix(), problem.num_parts, problem.seed)
