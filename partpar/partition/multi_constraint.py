r"""METIS with several balance constraints (Karypis & Kumar, SC 1998), which pymetis wraps no function for:
the C library inside of it is called directly."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pymetis
from numpy.typing import NDArray

from partpar.errors import PartitionError
from partpar.partition.balance import PartitionBalanceWarning, best_possible, part_loads
from partpar.partition.metis import check_objective, integer_weights, metis, without_edges
from partpar.partition.problem import Problem
from partpar.partition.registry import register
from partpar.partition.symmetrise import SymmetricGraph, symmetrise

METIS_OK = 1
NUM_OPTIONS = 40
OBJTYPE = 1  # the only option whose place in the array no release of METIS 5 has moved, and that is needed


@dataclass(frozen=True)
class Library:
    r"""METIS as a shared object, the width of its indices, and the places of its options."""

    handle: ctypes.CDLL
    index: type[np.signedinteger[Any]]
    places: dict[str, int]


def find_library() -> Library | None:
    r"""The METIS inside of pymetis; else the system's, whose indices have 32 bits and whose options other
    than the objective stand at places that differ between releases, so that it runs with its default seed;
    else :obj:`None`."""
    wrapper: Any = importlib.import_module("pymetis._internal")
    inside = ctypes.CDLL(wrapper.__file__)
    if hasattr(inside, "METIS_PartGraphKway"):
        names = ("OBJTYPE", "SEED", "NITER", "NCUTS")
        places = {name: int(getattr(wrapper.options_indices, name)) for name in names}
        index = np.int64 if pymetis.zero_copy_dtype() == np.int64 else np.int32
        return Library(inside, index, places)
    path = ctypes.util.find_library("metis")
    if path is None:
        return None
    return Library(ctypes.CDLL(path), np.int32, {"OBJTYPE": OBJTYPE})


def part_graph(
    library: Library,
    graph: SymmetricGraph,
    weights: NDArray[np.int64],
    num_parts: int,
    ubvec: NDArray[np.float64],
    recursive: bool,
    options: dict[str, int | None],
) -> NDArray[np.int32]:
    r"""One call of ``METIS_PartGraphKway`` or ``METIS_PartGraphRecursive``.

    Args:
        library: The METIS to call.
        graph: The graph, with at least one edge.
        weights: int64 ``[num_nodes, num_constraints]``.
        num_parts: At least 2: METIS crashes on 1 with several constraints.
        ubvec: ``[num_constraints]``, how many times the mean is allowed.
        recursive: Recursive bisection instead of k-way.
        options: METIS's options by their names in capitals; :obj:`None` leaves METIS's default.

    Raises:
        PartitionError: If METIS reports an error.
    """
    assert num_parts > 1
    assert graph.indices.size > 0
    if library.index is np.int32 and max(graph.indices.size, weights.sum(axis=0).max()) >= 2**31:
        raise PartitionError(
            "The graph is too large for the system's METIS, which counts in 32 bits; install pymetis"
        )
    index = library.index
    arrays = [np.ascontiguousarray(a, dtype=index) for a in (graph.indptr, graph.indices, weights)]
    edge_weights = None if graph.weights is None else np.ascontiguousarray(graph.weights, dtype=index)
    settings = np.full(NUM_OPTIONS, -1, dtype=index)
    for name, value in options.items():
        if value is not None and name in library.places:
            settings[library.places[name]] = value
    scalars = [np.array([n], dtype=index) for n in (graph.num_nodes, weights.shape[1], num_parts)]
    num_nodes, num_constraints, parts = map(_pointer, scalars)
    bounds = np.ascontiguousarray(ubvec, dtype=np.float32)
    cut = np.zeros(1, dtype=index)
    assignment = np.zeros(graph.num_nodes, dtype=index)
    call = library.handle.METIS_PartGraphRecursive if recursive else library.handle.METIS_PartGraphKway
    indptr, indices, node_weights = map(_pointer, arrays)
    status = call(
        num_nodes, num_constraints, indptr, indices, node_weights, None, _pointer(edge_weights), parts, None,
        _pointer(bounds), _pointer(settings), _pointer(cut), _pointer(assignment),
    )  # fmt: skip
    if status != METIS_OK:
        raise PartitionError(
            f"METIS failed with status {status} on {graph.num_nodes} nodes, {num_parts} parts"
        )
    return assignment.astype(np.int32)


def _pointer(array: NDArray[Any] | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _target(options: dict[str, Any]) -> float:
    return max(1.05, float(np.max(options.get("ubvec", 1.03))))


@register("multi-constraint-metis", target=_target)
def multi_constraint_metis(
    problem: Problem,
    *,
    ubvec: float | Sequence[float] = 1.03,
    recursive: bool | None = None,
    objective: str = "cut",
    niter: int | None = None,
    ncuts: int | None = None,
) -> NDArray[np.int32]:
    r"""METIS with any number of node weights, each of them even over the parts.

    METIS counts weights in integers: whole numbers are used as they are, others scaled so that a column sums
    to 2**30 (:func:`~partpar.partition.metis.integer_weights`). A weight that fewer nodes than parts carry
    cannot be even; it is left out of METIS's constraints, as is one that is zero everywhere.

    A result that leaves parts empty or misses 1.05 of the mean is tried again: with tighter bounds, other
    seeds, and recursive bisection unless ``recursive=False``; the evenest is kept. All of it follows from the
    seed.

    Args:
        problem: The graph. Its seed becomes METIS's.
        ubvec: How many times the mean a part may hold: one number, or one per node weight.
        recursive: ``True`` or ``False`` to allow only recursive bisection or only k-way partitioning.
        objective: ``"cut"`` or ``"volume"``.
        niter: Refinement passes per level.
        ncuts: Partitions to try in one call, of which the best is kept.
    """
    recursive = check_objective(objective, recursive)
    names = list(problem.node_weights) or ["#nodes"]
    bounds = np.asarray(ubvec, dtype=np.float64)
    if bounds.ndim == 0:
        bounds = np.broadcast_to(bounds, len(names))
    if len(bounds) != len(names) or np.min(bounds) <= 1:
        raise PartitionError(
            f"ubvec must be above 1: one number, or one per node weight ({len(names)}); found {ubvec}"
        )
    library = find_library()
    if library is None:
        return _combined(problem, objective=objective, recursive=recursive, niter=niter, ncuts=ncuts)
    graph = symmetrise(problem.edges, problem.num_nodes)
    assignment = without_edges(problem, graph)
    if assignment is not None:
        return assignment

    given = zip(problem.node_weights.values(), bounds, strict=False)
    kept = [(w.astype(np.float64), bound) for w, bound in given if np.count_nonzero(w) >= problem.num_parts]
    kept = kept or [(np.ones(problem.num_nodes), np.max(bounds))]
    columns = [column for column, _ in kept]
    weights = np.stack([integer_weights(column) for column in columns], axis=1)
    allowed = np.array([bound for _, bound in kept])

    target = np.maximum(1.05, allowed)
    limits = target * np.array([best_possible(column, problem.num_parts) for column in columns])
    options = {"OBJTYPE": 1 if objective == "volume" else None, "NITER": niter, "NCUTS": ncuts}
    best: tuple[tuple[int, float], NDArray[np.int32]] | None = None
    for bound, by_bisection, seed in _attempts(allowed, recursive, problem.seed):
        found = part_graph(
            library, graph, weights, problem.num_parts, bound, by_bisection, {**options, "SEED": seed}
        )
        loads = [part_loads(column, found, problem.num_parts).max() for column in columns]
        empty = problem.num_parts - np.unique(found).size
        score = (empty, max(1.0, float((np.array(loads) / limits).max())))
        if best is None or score < best[0]:
            best = (score, found)
        if best[0] == (0, 1.0):
            break
    assert best is not None
    return best[1]


def _attempts(
    allowed: NDArray[np.float64], recursive: bool | None, seed: int
) -> Iterator[tuple[NDArray[np.float64], bool, int]]:
    tighter = 1 + (allowed - 1) / 3
    if not recursive:
        yield allowed, False, seed
        yield tighter, False, seed
        yield tighter, False, seed + 1
    if recursive is not False:
        yield tighter if recursive is None else allowed, True, seed
        yield tighter, True, seed + 1


def _combined(problem: Problem, **options: Any) -> NDArray[np.int32]:
    r"""What can be done with pymetis alone: one weight, to which each constraint adds its share of the
    whole."""
    warnings.warn(
        "No METIS library with several constraints was found (pymetis hides its symbols and the system has "
        "no libmetis): balancing one combined weight instead",
        PartitionBalanceWarning,
        stacklevel=4,
    )
    weights = problem.weight_matrix()
    combined = (weights / weights.mean(axis=0)).mean(axis=1)
    return metis(
        Problem(problem.num_nodes, problem.edges, problem.num_parts, {"combined": combined}, problem.seed),
        **options,
    )
