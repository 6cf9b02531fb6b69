r"""The nodes of one type that a batch has found so far."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from partpar.kernels.relabel import copy_table, find_neighbours, number_neighbours, number_seeds, table_size
from partpar.sampling.subgraph import NO_IDS
from partpar.serving.buffers import Buffers
from partpar.serving.messages import HopReply


class FoundNodes:
    r"""Nodes in the order of their discovery, and a table from id to position.

    Args:
        num_nodes: Of this type in the whole graph.
        disjoint: Whether nodes belong to groups, one for each seed, and the same node of two groups is two.
        capacity: How many nodes are expected.
        buffers: Memory for tables.
    """

    def __init__(self, num_nodes: int, disjoint: bool, capacity: int, buffers: Buffers) -> None:
        self._stride = num_nodes
        self._disjoint = disjoint
        self._buffers = buffers
        self._table = self._new_table(capacity)
        self._ids: list[Tensor] = []
        self._raw_ids: list[Tensor] = []
        self._groups: list[Tensor] = []
        self.frontier: tuple[Tensor, Tensor] = (NO_IDS, NO_IDS)  # ids and groups found in the last hop
        self.first = 0  # position of the first of them
        self.size = 0
        self.counts: list[int] = []
        self._seen = 0  # pieces that were a frontier already

    def add_seeds(self, ids: Tensor, raw_ids: Tensor, groups: Tensor) -> None:
        r"""Seeds keep their positions, even those that stand there twice. Called once, before all else."""
        self._reserve(ids.numel())
        keys = ids + groups * self._stride if self._disjoint else ids
        number_seeds(self._table, keys.numpy())
        self._append(ids, raw_ids, groups)

    def add(self, reply: HopReply, first: int, groups: Tensor) -> tuple[Tensor, Tensor]:
        r"""Takes the neighbours of rows of another type, or of this one.

        Args:
            reply: The neighbours.
            first: Position of the first row among the nodes of its type.
            groups: The rows' groups; empty where sub-graphs are not disjoint.

        Returns:
            For each neighbour its position here and that of its row there.
        """
        m = reply.ids.numel()
        self._reserve(m)
        rows, cols, new_at = (np.empty(m, np.int64) for _ in range(3))
        new = number_neighbours(
            self._table,
            self.size,
            reply.ids.numpy(),
            reply.counts.numpy(),
            groups.numpy(),
            self._stride,
            first,
            rows,
            cols,
            new_at,
        )
        at, cols_t = torch.from_numpy(new_at[:new]), torch.from_numpy(cols)
        self._append(
            reply.ids[at], reply.raw_ids[at], groups[cols_t[at] - first] if self._disjoint else NO_IDS
        )
        return torch.from_numpy(rows), cols_t

    def find(self, reply: HopReply, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Which neighbours of the rows ``0, 1, …`` are known: their positions here, their rows, and where they stand in
        the reply."""
        m = reply.ids.numel()
        rows, cols, kept_at = (np.empty(m, np.int64) for _ in range(3))
        kept = find_neighbours(
            self._table,
            reply.ids.numpy(),
            reply.counts.numpy(),
            groups.numpy(),
            self._stride,
            rows,
            cols,
            kept_at,
        )
        row, col, at = (torch.from_numpy(column[:kept].copy()) for column in (rows, cols, kept_at))
        return row, col, at

    def advance(self) -> None:
        r"""Ends a hop: what it found is the frontier of the next."""
        ids = self._ids[self._seen :]
        found = sum(piece.numel() for piece in ids)
        self.frontier = (_cat(ids), _cat(self._groups[self._seen :]))
        self.first = self.size - found
        self.counts.append(found)
        self._seen = len(self._ids)

    def ids(self) -> Tensor:
        return _cat(self._ids)

    def raw_ids(self) -> Tensor:
        return _cat(self._raw_ids)

    def groups(self) -> Tensor:
        return _cat(self._groups)

    def _append(self, ids: Tensor, raw_ids: Tensor, groups: Tensor) -> None:
        if ids.numel():
            self._ids.append(ids)
            self._raw_ids.append(raw_ids)
            self._groups.append(groups)
            self.size += ids.numel()

    def _reserve(self, more: int) -> None:
        needed = self.size + more
        if 2 * needed > self._table.shape[0]:
            table = self._new_table(2 * needed)  # room for the next hop as well, so that it is copied rarely
            copy_table(self._table, table)
            self._table = table

    def _new_table(self, capacity: int) -> np.ndarray:
        """As :func:`~partpar.kernels.relabel.new_table`, in memory that serves again."""
        table: np.ndarray = self._buffers.empty((table_size(capacity), 2), torch.int64).fill_(-1).numpy()
        return table


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else NO_IDS
