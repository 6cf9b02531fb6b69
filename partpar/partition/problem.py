r"""What a partitioning algorithm is given: plain arrays, and edges that it may read in chunks but need never
hold."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from partpar.errors import PartitionError

Array = NDArray[Any]
EdgeChunk = tuple[NDArray[np.int64], NDArray[np.int64], Array | None]

CHUNK_EDGES = 1 << 20


class EdgeSource(Protocol):
    r"""Edges in raw edge order, read as often as an algorithm likes."""

    @property
    def num_edges(self) -> int:
        r"""The number of edges."""
        ...

    @property
    def weighted(self) -> bool:
        r"""Whether chunks carry weights."""
        ...

    def chunks(self, size: int = CHUNK_EDGES) -> Iterator[EdgeChunk]:
        r"""Yields ``(src, dst, weight)`` of at most ``size`` edges each; ``weight`` is :obj:`None` in an
        unweighted graph."""
        ...


@dataclass(frozen=True)
class ArrayEdges:
    r"""Edges in arrays. A memory-mapped array (:class:`numpy.memmap`) is read chunk by chunk and its pages
    are given back after each, so that resident memory stays at about one chunk.

    Args:
        edge_index: ``[2, E]`` integers; row 0 sources, row 1 destinations.
        weight: ``[E]`` nonnegative numbers, or :obj:`None`.
        src_offset: Added to every source; places a node type behind others in one id space.
        dst_offset: The same for destinations.
    """

    edge_index: Array
    weight: Array | None = None
    src_offset: int = 0
    dst_offset: int = 0

    def __post_init__(self) -> None:
        shape = self.edge_index.shape
        if len(shape) != 2 or shape[0] != 2:
            raise PartitionError(f"edge_index must have the shape [2, num_edges], found {list(shape)}")
        if self.edge_index.dtype.kind not in "iu":
            raise PartitionError(f"edge_index must hold integers, found {self.edge_index.dtype}")
        if self.weight is not None and self.weight.shape != (shape[1],):
            raise PartitionError(
                f"Edge weights must have the shape [{shape[1]}], found {list(self.weight.shape)}"
            )

    @property
    def num_edges(self) -> int:
        return int(self.edge_index.shape[1])

    @property
    def weighted(self) -> bool:
        return self.weight is not None

    def chunks(self, size: int = CHUNK_EDGES) -> Iterator[EdgeChunk]:
        mappings = [m for m in (_mapping(self.edge_index), _mapping(self.weight)) if m is not None]
        for start in range(0, self.num_edges, size):
            part = slice(start, start + size)
            src, dst = (np.array(row[part], dtype=np.int64) for row in self.edge_index)
            if self.src_offset:
                src += self.src_offset
            if self.dst_offset:
                dst += self.dst_offset
            weight = None if self.weight is None else np.array(self.weight[part])
            for mapping in mappings:
                mapping.madvise(mmap.MADV_DONTNEED)
            yield src, dst, weight


@dataclass(frozen=True)
class JoinedEdges:
    r"""Several edge sources, one after another: the edge types of a heterogeneous graph. Where some have
    weights and others not, an edge without one weighs 1."""

    sources: Sequence[EdgeSource]

    @property
    def num_edges(self) -> int:
        return sum(source.num_edges for source in self.sources)

    @property
    def weighted(self) -> bool:
        return any(source.weighted for source in self.sources)

    def chunks(self, size: int = CHUNK_EDGES) -> Iterator[EdgeChunk]:
        for source in self.sources:
            for src, dst, weight in source.chunks(size):
                if weight is None and self.weighted:
                    weight = np.ones(src.size, dtype=np.int64)
                yield src, dst, weight


def _mapping(array: Array | None) -> mmap.mmap | None:
    r"""The read-only memory map an array lies in, if any. A writable one may hold changes that a file does
    not, so its pages are not ours to drop."""
    base: Any = array
    read_only = False
    while base is not None and not isinstance(base, mmap.mmap):
        if isinstance(base, np.memmap):
            read_only = base.mode == "r"
        base = getattr(base, "base", None)
    return base if read_only and hasattr(mmap, "MADV_DONTNEED") else None


@dataclass(frozen=True)
class Problem:
    r"""A graph to divide into parts.

    Args:
        num_nodes: Number of nodes; ids run from 0.
        edges: The directed edges, with self-loops and duplicates if the graph has them.
        num_parts: How many parts are wanted.
        node_weights: Name to ``[num_nodes]`` nonnegative numbers (bool, integer or float). Each is to be
            spread evenly over the parts; none means that nodes count 1 each.
        seed: The same seed gives the same assignment.
    """

    num_nodes: int
    edges: EdgeSource
    num_parts: int
    node_weights: dict[str, Array] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_parts < 1:
            raise PartitionError(f"num_parts must be at least 1, found {self.num_parts}")
        if self.num_nodes < 0:
            raise PartitionError(f"num_nodes must not be negative, found {self.num_nodes}")
        if not 0 <= self.seed < 2**31:
            raise PartitionError(f"seed must be in 0 .. 2**31 - 1, found {self.seed}")
        for name, weight in self.node_weights.items():
            self._check_weight(name, weight)

    def _check_weight(self, name: str, weight: Array) -> None:
        if weight.shape != (self.num_nodes,):
            raise PartitionError(
                f"Node weight '{name}' must have one number per node, shape [{self.num_nodes}], "
                f"found {list(weight.shape)}"
            )
        if weight.dtype.kind not in "biuf":
            raise PartitionError(f"Node weight '{name}' must hold numbers or bools, found {weight.dtype}")
        bad = ~np.isfinite(weight) if weight.dtype.kind == "f" else np.zeros(0, bool)
        if weight.dtype.kind in "if":
            bad = weight < 0 if bad.size == 0 else bad | (weight < 0)
        if bad.any():
            node = int(np.flatnonzero(bad)[0])
            raise PartitionError(
                f"Node weight '{name}' must be finite and not negative, found {weight[node]} at node {node} "
                f"({int(bad.sum())} such nodes)"
            )

    def weight_matrix(self) -> NDArray[np.float64]:
        r"""The columns to balance, ``[num_nodes, num_constraints]``. A column of zeros asks for nothing and
        is left out; where nothing is left, every node counts 1."""
        columns = [np.asarray(w, dtype=np.float64) for w in self.node_weights.values() if w.any()]
        return np.stack(columns, axis=1) if columns else np.ones((self.num_nodes, 1))
