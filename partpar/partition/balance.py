r"""How evenly the parts came out, against what was asked for and what is possible at all."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partpar.partition.problem import Problem


class PartitionBalanceWarning(UserWarning):
    r"""A partition is less even than was asked for."""


def best_possible(weight: NDArray[Any], num_parts: int) -> float:
    r"""A lower bound on the heaviest part of any assignment: the mean, and what grains of this size allow.

    Among the ``(j - 1) * num_parts + 1`` heaviest nodes some part gets ``j``; so the ``j`` lightest of these
    fit into one part at best.

    Args:
        weight: ``[num_nodes]`` nonnegative numbers.
        num_parts: The number of parts.
    """
    values = np.sort(weight[weight > 0].astype(np.float64))[::-1]
    if values.size == 0:
        return 0.0
    prefix = np.concatenate([[0.0], np.cumsum(values)])
    crowd = np.arange(1, -(-values.size // num_parts) + 1)
    last = (crowd - 1) * num_parts + 1
    return float(max(prefix[-1] / num_parts, (prefix[last] - prefix[last - crowd]).max()))


def part_loads(weight: NDArray[Any], assignment: NDArray[np.int32], num_parts: int) -> NDArray[np.float64]:
    r"""The total weight in each part, ``[num_parts]``."""
    return np.bincount(assignment, weights=weight, minlength=num_parts).astype(np.float64)


def check_balance(problem: Problem, assignment: NDArray[np.int32], target: float, algorithm: str) -> None:
    r"""Warns, with the figure reached, of each constraint whose heaviest part is above ``target`` times the
    mean. What the size of single nodes makes impossible is not asked for."""
    weights = problem.node_weights or {"#nodes": np.ones(problem.num_nodes, dtype=bool)}
    for name, weight in weights.items():
        loads = part_loads(weight, assignment, problem.num_parts)
        mean = float(loads.mean())
        if loads.max() <= target * mean * (1 + 1e-9):
            continue
        bound = best_possible(weight, problem.num_parts)
        if loads.max() > target * bound * (1 + 1e-9):
            warnings.warn(
                f"{algorithm}: '{name}' is out of balance: the heaviest of {problem.num_parts} parts holds "
                f"{loads.max():.6g}, {loads.max() / mean:.3f} times the mean {mean:.6g}; asked for at most "
                f"{target:.3f} times (best possible: {bound / mean:.3f})",
                PartitionBalanceWarning,
                stacklevel=4,
            )
