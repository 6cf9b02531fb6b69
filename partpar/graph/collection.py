r"""Many small graphs in one set of arrays, to be taken a few at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.graph.npz import read_npz

_NEEDED = ("edge_index", "node_ptr", "edge_ptr", "y")


@dataclass(frozen=True)
class GraphCollection:
    r"""Graph ``g`` has the nodes ``node_ptr[g]`` to ``node_ptr[g + 1] - 1`` and the edges ``edge_ptr[g]`` to
    ``edge_ptr[g + 1] - 1``; node numbers in :obj:`edge_index` are those of the whole collection.

    Args:
        edge_index: ``[2, E]`` int64.
        node_ptr: ``[num_graphs + 1]`` int64.
        edge_ptr: ``[num_graphs + 1]`` int64.
        y: ``[num_graphs]`` int64.
        node_label: ``[num_nodes]`` int64.
        edge_label: ``[E]`` int64.
        node_attr: ``[num_nodes, D]`` floating.
    """

    edge_index: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor
    y: Tensor
    node_label: Tensor | None = None
    edge_label: Tensor | None = None
    node_attr: Tensor | None = None

    @classmethod
    def from_npz(cls, path: str | Path) -> GraphCollection:
        r"""Reads the fields by their names from one ``.npz`` file of plain arrays.

        Raises:
            GraphError: There is no such file, or arrays are missing or do not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise GraphError(f"{path}: expected an .npz file of graphs, found none there")
        found = read_npz(path, GraphError, cls.__annotations__)
        arrays = {name: torch.from_numpy(array) for name, array in found.items()}
        missing = [name for name in _NEEDED if name not in arrays]
        if missing:
            raise GraphError(f"{path}: expected the arrays {', '.join(_NEEDED)}, found no {', '.join(missing)}")
        made = cls(**arrays)
        num_nodes, num_edges = int(made.node_ptr[-1]), int(made.edge_ptr[-1])
        ends = made.edge_index
        if tuple(ends.shape) != (2, num_edges) or (num_edges and not 0 <= int(ends.min()) <= int(ends.max()) < num_nodes):
            raise GraphError(
                f"{path}: expected edge_index [2, {num_edges}] of numbers below {num_nodes}, found {list(ends.shape)}"
            )
        return made

    def __len__(self) -> int:
        return self.y.numel()

    def nodes_of(self, graphs: Tensor) -> tuple[Tensor, Tensor]:
        r"""The nodes of some graphs, one graph after the other, and the place of each node's graph among them."""
        return _ranges(self.node_ptr, graphs)

    def edges_of(self, graphs: Tensor) -> tuple[Tensor, Tensor]:
        r"""The places of some graphs' edges, and the edges, by the nodes' places in :meth:`nodes_of`; ``[2, E]``."""
        places, graph = _ranges(self.edge_ptr, graphs)
        sizes = self.node_ptr.diff()[graphs]
        shift = sizes.cumsum(0) - sizes - self.node_ptr[graphs]
        return places, self.edge_index[:, places] + shift[graph]


def _ranges(ptr: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    sizes = ptr.diff()[chosen]
    owner = torch.arange(chosen.numel()).repeat_interleave(sizes)
    shift = ptr[chosen] - (sizes.cumsum(0) - sizes)
    return torch.arange(int(sizes.sum())) + shift[owner], owner
