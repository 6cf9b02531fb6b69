r"""Any bipartite convolution of PyG, partition-parallel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from partpar.kernels.adjacency import Adjacency
from partpar.nn.matrix import AdjacencyMatrix
from partpar.nn.neighbourhood import edge_index_of
from partpar.nn.rows import (
    check_edges,
    check_flow,
    check_owned_first,
    owned,
    refuse_over_all_rows,
    takes_route,
    with_halo,
)
from partpar.nn.source_rows import SourceRows
from partpar.route import Route


class RoutedConv(torch.nn.Module):
    r"""Makes a convolution that works on bipartite graphs partition-parallel, by calling it as
    ``conv((route.apply(x), x), edge_index, ...)``.

    Sources are the owned nodes first and then the halo, so node ``i`` is row ``i`` on both sides: self-loops
    that the convolution looks for, removes or adds are those of the whole graph.

    .. code-block:: python

        conv = RoutedConv(torch_geometric.nn.TransformerConv(16, 32, edge_dim=3))
        x = conv(x, edge_index, route, edge_attr=edge_attr)

    The keys of its ``state_dict`` are those of :obj:`conv` with ``conv.`` before them. Random draws inside
    :obj:`conv` (such as attention dropout) are its own, hence not the same for another number of workers;
    those of :class:`~partpar.nn.GATConv` and :class:`~partpar.nn.Dropout` are.

    Args:
        conv (torch.nn.Module): A convolution whose ``forward`` takes a pair ``(x_src, x_dst)``.

    Raises:
        ValueError: :obj:`conv` takes no pair, sends messages from target to source, or has a norm over all
            rows.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`: row 0 into the sources
          (owned, then halo), row 1 into the owned nodes
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        check_bipartite(conv, "RoutedConv")
        self.conv = conv

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters of the convolution."""
        self.conv.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        x: Tensor | SourceRows,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""Runs the convolution on owned rows.

        Args:
            x (torch.Tensor or SourceRows): The rows of the owned nodes, or constant rows with their halo.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            \**kwargs (optional): What else the convolution takes, such as :obj:`edge_attr` in the order of edges.
        """
        check_edges(self, x, edge_index, route)
        check_owned_first(self, route)
        if isinstance(edge_index, Adjacency):
            if getattr(self.conv, "fuse", False) and not kwargs:
                edge_index = AdjacencyMatrix(edge_index, owned(x).dtype)
            else:
                edge_index = edge_index_of(edge_index)
        return self.conv((with_halo(x, route), owned(x)), edge_index, **kwargs)


def check_bipartite(conv: torch.nn.Module, where: str) -> None:
    r"""Refuses a convolution that could not be called with ``(sources, owned)``.

    Raises:
        ValueError: It takes no pair, sends messages from target to source, or has a norm over all rows;
            :obj:`where` begins the message.
    """
    check_flow(conv, getattr(conv, "flow", "source_to_target"))
    refuse_over_all_rows(conv, f"{where}({type(conv).__name__})")
    if not takes_pair(conv):
        ours = ", ".join(sorted(_ROUTED_THEMSELVES))
        raise ValueError(
            f"{where}: expected a convolution that takes a pair (x_src, x_dst), found "
            f"{type(conv).__name__}, whose forward takes a single tensor; partpar.nn has {ours}, or write the "
            f"layer with one line, x = route.apply(x)"
        )


def takes_pair(conv: torch.nn.Module) -> bool:
    r"""Whether a convolution may be called with ``(sources, owned)``, as far as its signature tells."""
    first = next(iter(inspect.signature(conv.forward).parameters.values()), None)
    return (
        first is not None
        and not takes_route(conv)
        and first.annotation not in (Tensor, "Tensor", "torch.Tensor")
    )


_ROUTED_THEMSELVES = {"GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "GINConv", "GINEConv"}
