r"""METIS through pymetis: multilevel partitioning of the symmetric copy of a graph (Karypis & Kumar, SIAM J.
Sci. Comput. 1998)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pymetis
from numpy.typing import NDArray

from partpar.errors import PartitionError
from partpar.partition.problem import Problem
from partpar.partition.random import deal
from partpar.partition.registry import register
from partpar.partition.symmetrise import SymmetricGraph, symmetrise

# Sums of weights stay below this, so that they also fit METIS built for 32-bit indices.
TOTAL_WEIGHT = 2**30


def integer_weights(column: NDArray[np.float64]) -> NDArray[np.int64]:
    r"""Node weights as METIS takes them. Whole numbers that sum to less than 2**30 stay as they are; others
    are scaled so that they sum to 2**30, and rounded. The share of one node in the whole is thus kept to
    about 1e-9.

    Args:
        column: ``[num_nodes]`` nonnegative finite numbers, not all zero.
    """
    total = float(column.sum())
    if total < TOTAL_WEIGHT and bool((column == np.rint(column)).all()):
        return column.astype(np.int64)
    return np.rint(column * (TOTAL_WEIGHT / total)).astype(np.int64)


def without_edges(problem: Problem, graph: SymmetricGraph) -> NDArray[np.int32] | None:
    r"""The assignment where there is nothing to optimise and METIS would stumble: as many parts as nodes, or
    no edges. :obj:`None` if METIS should run."""
    if problem.num_parts >= problem.num_nodes:
        return np.arange(problem.num_nodes, dtype=np.int32)
    if graph.indices.size == 0:
        return deal(problem.weight_matrix(), problem.num_parts, problem.seed)
    return None


def check_objective(objective: str, recursive: bool | None) -> bool | None:
    r"""Checks the options that all METIS algorithms share; returns ``recursive`` as METIS can have it.

    Raises:
        PartitionError: If there is no such objective, or METIS cannot reach it by recursive bisection.
    """
    if objective not in ("cut", "volume"):
        raise PartitionError(f"objective must be 'cut' or 'volume', found {objective!r}")
    if objective == "volume":
        if recursive:
            raise PartitionError(
                "METIS minimises volume k-way only; leave recursive out or pass recursive=False"
            )
        return False
    return recursive


def _target(options: dict[str, Any]) -> float:
    ufactor = options.get("ufactor")
    return 1.05 if ufactor is None else 1 + ufactor / 1000


@register("metis", target=_target)
def metis(
    problem: Problem,
    *,
    objective: str = "cut",
    recursive: bool | None = None,
    ufactor: int | None = None,
    niter: int | None = None,
    ncuts: int | None = None,
) -> NDArray[np.int32]:
    r"""METIS with at most one node weight; with several it is ``multi-constraint-metis``.

    Args:
        problem: The graph. Its seed becomes METIS's.
        objective: ``"cut"`` (edges between parts) or ``"volume"`` (rows that travel, slower by several
            times).
        recursive: Recursive bisection instead of k-way; by default up to 8 parts, as pymetis does.
        ufactor: Allowed imbalance in thousandths; by default METIS's (30 k-way, 1 per bisection).
        niter: Refinement passes per level.
        ncuts: Partitions to try, of which the best is kept.
    """
    recursive = check_objective(objective, recursive)
    weights = problem.weight_matrix()
    if weights.shape[1] > 1:
        from partpar.partition.multi_constraint import multi_constraint_metis  # which falls back on this one

        ubvec = 1.03 if ufactor is None else 1 + ufactor / 1000
        return multi_constraint_metis(
            problem, ubvec=ubvec, recursive=recursive, objective=objective, niter=niter, ncuts=ncuts
        )
    graph = symmetrise(problem.edges, problem.num_nodes)
    assignment = without_edges(problem, graph)
    if assignment is not None:
        return assignment
    column = weights[:, 0]
    uniform = bool((column == column[0]).all())
    given = {"seed": problem.seed, "ufactor": ufactor, "niter": niter, "ncuts": ncuts}
    if objective == "volume":
        given["objtype"] = int(pymetis.ObjType.VOL)
    result = pymetis.part_graph(
        problem.num_parts,
        pymetis.CSRAdjacency(graph.indptr, graph.indices),
        vweights=None if uniform else integer_weights(column),
        eweights=graph.weights,
        recursive=recursive,
        options=pymetis.Options(**{name: value for name, value in given.items() if value is not None}),
    )
    return np.asarray(result.vertex_part, dtype=np.int32)
