r"""A symmetric adjacency in blocks of consecutive rows: one block in memory where it is small, else many in a
temporary file, so that a stream over its rows needs memory for one block only."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from partpar.kernels import ldg as kernels
from partpar.kernels import symmetric
from partpar.partition.problem import Array, EdgeChunk, EdgeSource

NO_WEIGHTS = np.empty(0, dtype=np.float64)


class Block(NamedTuple):
    r"""Rows ``first ..`` of an adjacency: ``indptr`` ``[rows + 1]``, counted from ``indptr[0]`` into
    ``neighbours``; ``weights`` is empty in an unweighted graph."""

    first: int
    indptr: NDArray[np.int64]
    neighbours: Array
    weights: Array


@dataclass
class Blocks:
    r"""Both directions of each edge, by row and within a row in raw edge order, without self-loops;
    duplicates stay. Rows and neighbours may be renamed on the way in, so that any order of nodes is streamed
    front to back.

    Blocks in memory and on disk hold the same rows in the same order. A context manager: its files go at the
    end.

    Args:
        edges: The graph.
        num_nodes: Number of nodes.
        rank: int64 ``[num_nodes]``, new ids, or :obj:`None` to keep ids.
        memory_bytes: The adjacency stays in memory up to this size; above it, a block takes a quarter of
            this.
    """

    edges: EdgeSource
    num_nodes: int
    rank: Array | None
    memory_bytes: int
    indptr: NDArray[np.int64] = field(init=False)
    bounds: NDArray[np.int64] = field(init=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(init=False, default=None)
    _neighbours: Array = field(init=False)
    _weights: Array = field(init=False)

    def __post_init__(self) -> None:
        self.id_type = np.dtype(np.int32 if self.num_nodes < 2**31 else np.int64)
        self.indptr = np.zeros(self.num_nodes + 1, dtype=np.int64)
        for src, dst, _ in self._chunks():
            symmetric.count_entries(self.indptr[1:], src, dst)
        np.cumsum(self.indptr, out=self.indptr)
        entry_bytes = self.id_type.itemsize + (8 if self.edges.weighted else 0)
        if int(self.indptr[-1]) * entry_bytes <= self.memory_bytes:
            self._fill()
        else:
            self._spill(max(self.memory_bytes // (4 * entry_bytes), 1))

    def __enter__(self) -> Blocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def on_disk(self) -> bool:
        r"""Whether the adjacency was too large for memory."""
        return self._folder is not None

    def __iter__(self) -> Iterator[Block]:
        for first, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            indptr = self.indptr[first : stop + 1]
            if self._folder is None:
                yield Block(int(first), indptr, self._neighbours, self._weights)
            else:
                begin, size = int(indptr[0]), int(indptr[-1] - indptr[0])
                yield Block(int(first), indptr, *self._read("adjacency", begin, size))

    def breadth_first(self) -> Array:
        r"""The nodes in breadth-first order, components by their lowest node.

        On disk, rows are looked up through a memory map whose pages are given back as the visit goes on.
        """
        order = np.empty(self.num_nodes, dtype=self.id_type)
        seen = np.zeros(self.num_nodes, dtype=bool)
        state = np.zeros(3, dtype=np.int64)
        if self._folder is None:
            kernels.visit_breadth_first(self.indptr, self._neighbours, order, seen, state, 2**62)
            return order
        with self._path("adjacency.ids").open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            neighbours = np.frombuffer(mapping, dtype=self.id_type)
            budget = max(self.memory_bytes // 256, 1)  # one entry read may bring in a page of far more
            while not kernels.visit_breadth_first(self.indptr, neighbours, order, seen, state, budget):
                if hasattr(mmap, "MADV_DONTNEED"):
                    mapping.madvise(mmap.MADV_DONTNEED)
            del neighbours
            mapping.close()
        return order

    def _chunks(self) -> Iterator[EdgeChunk]:
        size = max(min(self.memory_bytes // 128, 1 << 20), 1 << 10)
        for src, dst, weight in self.edges.chunks(size):
            if self.rank is not None:
                src, dst = self.rank[src], self.rank[dst]
            yield src, dst, weight

    def _fill(self) -> None:
        self.bounds = np.array([0, self.num_nodes], dtype=np.int64)
        self._neighbours = np.empty(int(self.indptr[-1]), dtype=self.id_type)
        self._weights = np.empty(self._neighbours.size if self.edges.weighted else 0, dtype=np.float64)
        cursor = self.indptr[:-1].copy()
        for src, dst, weight in self._chunks():
            if weight is None:
                symmetric.fill_entries(cursor, self._neighbours, src, dst)
            else:
                symmetric.fill_weighted_entries(
                    cursor, self._neighbours, self._weights, src, dst, weight.astype(np.float64)
                )

    def _spill(self, block_entries: int) -> None:
        r"""Scatters entries into one file per block, then sorts each block by row and appends it to the
        adjacency."""
        self._folder = tempfile.TemporaryDirectory(prefix="partpar-")
        # Equal shares of the entries; a row is never split, so a block may hold one row more than its share.
        num_blocks = min(-(-int(self.indptr[-1]) // block_entries), 4096)
        shares = np.arange(1, num_blocks, dtype=np.int64) * int(self.indptr[-1]) // num_blocks
        cuts = np.searchsorted(self.indptr, shares)
        self.bounds = np.unique(np.concatenate([[0], cuts, [self.num_nodes]]))
        for src, dst, weight in self._chunks():
            self._scatter(src, dst, weight)
        for block, (first, stop) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            base, size = int(self.indptr[first]), int(self.indptr[stop] - self.indptr[first])
            entries, entry_weights = self._read(f"block-{block}", 0, size)
            rows = (
                np.empty(0, self.id_type)
                if size == 0
                else np.fromfile(self._path(f"block-{block}.rows"), self.id_type)
            )
            neighbours, weights = np.empty_like(entries), np.empty_like(entry_weights)
            kernels.place_entries(
                self.indptr[first:stop] - base, int(first), rows, entries, entry_weights, neighbours, weights
            )
            self._append("adjacency", neighbours, weights)
            for path in Path(self._folder.name).glob(f"block-{block}.*"):
                path.unlink()

    def _scatter(self, src: Array, dst: Array, weight: Array | None) -> None:
        rows, neighbours = (np.empty(2 * src.size, dtype=self.id_type) for _ in range(2))
        weights = NO_WEIGHTS if weight is None else np.empty(2 * src.size, dtype=np.float64)
        ends = np.zeros(self.bounds.size, dtype=np.int64)
        given = NO_WEIGHTS if weight is None else weight.astype(np.float64)
        kernels.scatter_entries(self.bounds, ends, rows, neighbours, weights, src, dst, given)
        begin = 0
        for block, end in enumerate(ends[:-1].tolist()):
            if end > begin:
                self._append(f"block-{block}", neighbours[begin:end], weights[begin:end], rows[begin:end])
            begin = end

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / name

    def _append(self, name: str, ids: Array, weights: Array, rows: Array | None = None) -> None:
        for suffix, array in (("ids", ids), ("weights", weights), ("rows", rows)):
            if array is not None and array.size:
                with self._path(f"{name}.{suffix}").open("ab") as file:
                    array.tofile(file)

    def _read(self, name: str, begin: int, size: int) -> tuple[Array, Array]:
        if size == 0:
            return np.empty(0, dtype=self.id_type), NO_WEIGHTS

        def read(suffix: str, dtype: np.dtype[Any]) -> Array:
            return np.fromfile(self._path(f"{name}.{suffix}"), dtype, size, offset=begin * dtype.itemsize)

        ids = read("ids", self.id_type)
        return ids, read("weights", np.dtype(np.float64)) if self.edges.weighted else NO_WEIGHTS
