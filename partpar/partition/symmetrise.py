r"""The undirected graph that METIS divides: both directions of every edge, merged, without self-loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partpar.kernels import symmetric
from partpar.partition.problem import EdgeSource

Int64 = NDArray[np.int64]

# Float edge weights are scaled so that an entry weighs this much on average, then rounded.
MEAN_FLOAT_WEIGHT = 1000


@dataclass(frozen=True)
class SymmetricGraph:
    r"""A symmetric adjacency with sorted rows, no self-loops and no duplicates.

    Args:
        indptr: int64 ``[num_nodes + 1]``.
        indices: int64 ``[num_entries]``; each undirected edge stands in the rows of both its ends.
        weights: int64 ``[num_entries]``, at least 1, equal in both directions; :obj:`None` where all are 1.
    """

    indptr: Int64
    indices: Int64
    weights: Int64 | None

    @property
    def num_nodes(self) -> int:
        r"""The number of nodes."""
        return self.indptr.size - 1

    def cut(self, assignment: NDArray[np.int32]) -> int:
        r"""The total weight of undirected edges between parts: METIS's edge cut."""
        rows = np.repeat(np.arange(self.num_nodes, dtype=np.int32), np.diff(self.indptr))
        crossing = assignment[rows] != assignment[self.indices]
        total = crossing.sum() if self.weights is None else self.weights[crossing].sum()
        return int(total) // 2


def symmetrise(edges: EdgeSource, num_nodes: int) -> SymmetricGraph:
    r"""Builds the symmetric copy of a graph, reading its edges twice in chunks.

    Without edge weights an entry weighs as many as there are edges between its two nodes, in either
    direction. Integer edge weights are summed instead; float ones too, then scaled to 1000 on average and
    rounded; every entry weighs at least 1, as METIS asks. Where every entry weighs 1, no weights are kept.

    Peak memory is 16 bytes per edge, and 16 more where edges have weights, beside the result's.
    """
    indptr = np.zeros(num_nodes + 1, dtype=np.int64)
    for src, dst, _ in edges.chunks():
        symmetric.count_entries(indptr[1:], src, dst)
    np.cumsum(indptr, out=indptr)
    indices = np.empty(int(indptr[-1]), dtype=np.int64)
    if edges.weighted:
        return _sum_weights(edges, indptr, indices)

    cursor = indptr[:-1].copy()
    for src, dst, _ in edges.chunks():
        symmetric.fill_entries(cursor, indices, src, dst)
    distinct = symmetric.sort_rows(indptr, indices)
    times = np.empty(distinct if distinct < indices.size else 0, dtype=np.int64)
    symmetric.merge_rows(indptr, indices, times)
    indices.resize(distinct, refcheck=False)
    return SymmetricGraph(indptr, indices, times if times.size else None)


def _sum_weights(edges: EdgeSource, indptr: Int64, indices: Int64) -> SymmetricGraph:
    sums = np.empty(indices.size, dtype=np.float64)
    whole = True
    cursor = indptr[:-1].copy()
    for src, dst, weight in edges.chunks():
        assert weight is not None
        whole = whole and weight.dtype.kind in "biu"
        symmetric.fill_weighted_entries(cursor, indices, sums, src, dst, weight.astype(np.float64))
    symmetric.merge_weighted_rows(indptr, indices, sums)
    indices.resize(int(indptr[-1]), refcheck=False)
    sums.resize(indices.size, refcheck=False)
    total = float(sums.sum())
    if not whole and total > 0:
        sums *= MEAN_FLOAT_WEIGHT * indices.size / total
    weights = np.maximum(np.rint(sums), 1).astype(np.int64)
    return SymmetricGraph(indptr, indices, None if bool((weights == 1).all()) else weights)
