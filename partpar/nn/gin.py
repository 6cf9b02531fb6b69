r"""Graph isomorphism networks, partition-parallel, without and with edge attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptPairTensor, OptTensor

from partpar.kernels.adjacency import Adjacency
from partpar.nn import rows
from partpar.nn.neighbourhood import edge_index_of, sum_neighbours, sum_of
from partpar.nn.rows import Rows, check_edges, check_flow, of_block, owned, with_halo
from partpar.nn.source_rows import SourceRows
from partpar.nn.streamed import Stages, row_wise, stages_of
from partpar.route import Route


class GINConv(pyg_nn.GINConv):
    r"""The graph isomorphism operator of `"How Powerful are Graph Neural Networks?"
    <https://arxiv.org/abs/1810.00826>`_, partition-parallel.

    .. math::
        \mathbf{x}^{\prime}_i = h_{\mathbf{\Theta}} \left( (1 + \epsilon) \cdot \mathbf{x}_i +
        \sum_{j \in \mathcal{N}(i)} \mathbf{x}_j \right)

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.GINConv`. The route is
    handed to :obj:`nn`, or to those members of a :class:`torch.nn.Sequential`, that take one
    (:class:`~partpar.nn.SyncBatchNorm`, :class:`~partpar.nn.Dropout`, :class:`~partpar.nn.MLP`).

    Raises:
        ValueError: :obj:`nn` has a norm over all rows that no route would reach, or :obj:`flow` is not
            ``"source_to_target"``.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    propagate_type = {"x": OptPairTensor}

    def __init__(
        self, nn: Callable[..., Any], eps: float = 0.0, train_eps: bool = False, **kwargs: Any
    ) -> None:
        rows.refuse_over_all_rows(nn, "GINConv")
        super().__init__(nn, eps, train_eps, **kwargs)
        check_flow(self, self.flow)

    def forward(self, x: Rows, edge_index: Tensor | Adjacency, route: Route | None = None) -> Tensor:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor or SourceRows): The rows of the owned nodes, or constant rows with their halo.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
        """
        x = of_block(x, edge_index, route)
        check_edges(self, x, edge_index, route)
        if isinstance(edge_index, Adjacency):
            out = sum_neighbours(edge_index, x, route)
        else:
            out = self.propagate(edge_index, x=(with_halo(x, route), owned(x)))
        return rows.call(self.nn, out + (1 + self.eps) * owned(x), route)

    @property
    def streams(self) -> bool:
        r"""Whether :meth:`stages` may be called."""
        return row_wise(self.nn)

    def stages(self, x: Tensor | SourceRows, adj: Adjacency, route: Route | None) -> Stages:
        r"""The layer in a form that may go over its rows piece by piece (collective)."""
        check_edges(self, x, adj, route)

        def after(total: Tensor, x: Tensor, route: Route) -> Tensor:
            return rows.call(self.nn, total + (1 + self.eps) * x, route)

        return stages_of(sum_of(adj, route), x, after)


class GINEConv(pyg_nn.GINEConv):
    r"""The modified :class:`GINConv` of `"Strategies for Pre-training Graph Neural Networks"
    <https://arxiv.org/abs/1905.12265>`_, which takes edge attributes, partition-parallel.

    .. math::
        \mathbf{x}^{\prime}_i = h_{\mathbf{\Theta}} \left( (1 + \epsilon) \cdot \mathbf{x}_i +
        \sum_{j \in \mathcal{N}(i)} \mathrm{ReLU} ( \mathbf{x}_j + \mathbf{e}_{j,i} ) \right)

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.GINEConv`; :obj:`nn` as
    for :class:`GINConv`.

    Raises:
        ValueError: As for :class:`GINConv`.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`, edge attributes :math:`(E,
          D)`
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    propagate_type = {"x": OptPairTensor, "edge_attr": OptTensor}

    def __init__(
        self,
        nn: torch.nn.Module,
        eps: float = 0.0,
        train_eps: bool = False,
        edge_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        rows.refuse_over_all_rows(nn, "GINEConv")
        super().__init__(nn, eps, train_eps, edge_dim, **kwargs)
        check_flow(self, self.flow)

    def forward(
        self,
        x: Rows,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor or SourceRows): The rows of the owned nodes, or constant rows with their halo.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            edge_attr (torch.Tensor): A row for each edge.
        """
        if edge_attr is None:
            raise ValueError(
                "GINEConv: expected edge_attr, found None; use GINConv for a graph without edge attributes"
            )
        x = of_block(x, edge_index, route)
        check_edges(self, x, edge_index, route, edge_attr=edge_attr)
        if isinstance(edge_index, Adjacency):  # a message is no product: it must be made for each edge
            edge_index = edge_index_of(edge_index)
        out = self.propagate(edge_index, x=(with_halo(x, route), owned(x)), edge_attr=edge_attr)
        return rows.call(self.nn, out + (1 + self.eps) * owned(x), route)
