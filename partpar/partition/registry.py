r"""The partitioning algorithms by name. A new one is one function in one file:

.. code-block:: python

    @register("mine")
    def mine(problem: Problem, *, patience: int = 3) -> NDArray[np.int32]:
        ...

and a line in ``_FILES``, so that the file is found without being imported by anyone else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partpar.errors import PartitionError
from partpar.partition.balance import check_balance
from partpar.partition.problem import Problem

Assignment = NDArray[np.int32]

_FILES = ("metis", "multi_constraint", "ldg", "random")


@dataclass(frozen=True)
class _Algorithm:
    name: str
    run: Callable[..., Assignment]
    target: Callable[[dict[str, Any]], float]

    @property
    def options(self) -> list[str]:
        parameters = inspect.signature(self.run).parameters.values()
        return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


_ALGORITHMS: dict[str, _Algorithm] = {}
_CANONICAL: dict[str, str] = {}


def register(
    name: str, *aliases: str, target: Callable[[dict[str, Any]], float] = lambda options: 1.05
) -> Callable[[Callable[..., Assignment]], Callable[..., Assignment]]:
    r"""Makes a function known as a partitioning algorithm.

    The function takes a :class:`Problem` with at least one node and two parts, and keyword-only options; it
    returns ``[num_nodes]`` parts as int32.

    Args:
        name: What users call it, and what partitions on disk are named by.
        aliases: Other spellings.
        target: From the options given, how many times the mean the heaviest part may hold before a warning.
    """

    def add(run: Callable[..., Assignment]) -> Callable[..., Assignment]:
        _ALGORITHMS[name] = _Algorithm(name, run, target)
        _CANONICAL.update(dict.fromkeys((name, *aliases), name))
        return run

    return add


def _load() -> None:
    for file in _FILES:
        importlib.import_module(f"partpar.partition.{file}")


def names() -> list[str]:
    r"""The names of all algorithms, aliases left out."""
    _load()
    return sorted(_ALGORITHMS)


def canonical(name: str) -> str:
    r"""The name of an algorithm behind any of its spellings.

    Raises:
        PartitionError: If there is none of that name.
    """
    _load()
    if name not in _CANONICAL:
        raise PartitionError(
            f"Unknown partitioning algorithm '{name}'; known are {', '.join(sorted(_CANONICAL))}"
        )
    return _CANONICAL[name]


def check_options(algorithm: str, options: dict[str, Any]) -> None:
    r"""Checks that an algorithm takes the options given, before any work is done.

    Raises:
        PartitionError: If there is no such algorithm, or it has no such option.
    """
    entry = _ALGORITHMS[canonical(algorithm)]
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        raise PartitionError(
            f"'{entry.name}' takes no option {', '.join(map(repr, unknown))}; "
            f"it accepts {', '.join(entry.options) or 'none'}"
        )


def assign(algorithm: str, problem: Problem, **options: Any) -> Assignment:
    r"""Assigns each node to a part.

    Args:
        algorithm: A name or alias.
        problem: The graph, the number of parts, the weights and the seed.
        options: Options of the algorithm.

    Returns:
        int32 ``[num_nodes]`` with entries in ``0 .. num_parts - 1``. Parts may be empty.

    Raises:
        PartitionError: If the algorithm or an option is unknown, or the edges name nodes that do not exist.
    """
    check_options(algorithm, options)
    entry = _ALGORITHMS[canonical(algorithm)]
    _check_edges(problem)
    if problem.num_parts == 1 or problem.num_nodes == 0:
        return np.zeros(problem.num_nodes, dtype=np.int32)
    assignment = entry.run(problem, **options)
    assert assignment.shape == (problem.num_nodes,)
    assert assignment.dtype == np.int32
    assert 0 <= assignment.min() <= assignment.max() < problem.num_parts
    check_balance(problem, assignment, entry.target(options), entry.name)
    return assignment


def _check_edges(problem: Problem) -> None:
    r"""Kernels index without checks, so nothing reaches them that could lead outside of an array."""
    for src, dst, weight in problem.edges.chunks():
        for ids in (src, dst):
            if ids.size and (ids.min() < 0 or ids.max() >= problem.num_nodes):
                bad = ids[(ids < 0) | (ids >= problem.num_nodes)][0]
                raise PartitionError(f"An edge names node {bad}; ids must be in 0 .. {problem.num_nodes - 1}")
        if weight is not None and not (np.isfinite(weight).all() and (weight >= 0).all()):
            bad_weight = weight[~(np.isfinite(weight) & (weight >= 0))][0]
            raise PartitionError(f"Edge weights must be finite and not negative, found {bad_weight}")
