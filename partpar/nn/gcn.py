r"""Graph convolution whose degrees are those of the whole graph."""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptTensor
from torch_geometric.utils import add_remaining_self_loops, scatter

from partpar.nn.rows import check_edges, check_flow, check_owned_first, with_halo
from partpar.route import Route


def gcn_norm(
    edge_index: Tensor,
    edge_weight: Tensor | None,
    num_nodes: int,
    route: Route | None = None,
    improved: bool = False,
    add_self_loops: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""PyG's :func:`~torch_geometric.nn.conv.gcn_conv.gcn_norm` for a share: every in-edge of an owned node
    is here, so its degree is known here, and those of the halo come by the route (one exchange of one
    column).

    Args:
        edge_index: ``[2, E]``, the share's edges.
        edge_weight: ``[E]`` or :obj:`None` for ones.
        num_nodes: The number of owned nodes.
        route: The share's route.
        improved: Self-loops weigh 2 instead of 1.
        add_self_loops: Whether nodes without a self-loop get one.
        dtype: Of the weights when there are none.

    Returns:
        Edges and their weights, self-loops last.
    """
    if add_self_loops:
        edge_index, edge_weight = add_remaining_self_loops(
            edge_index, edge_weight, 2.0 if improved else 1.0, num_nodes
        )
    if edge_weight is None:
        edge_weight = torch.ones(edge_index.size(1), dtype=dtype, device=edge_index.device)
    row, col = edge_index[0], edge_index[1]
    degree = scatter(edge_weight, col, dim=0, dim_size=num_nodes, reduce="sum")
    scale = degree.pow(-0.5)
    scale = scale.masked_fill(scale == float("inf"), 0.0)
    return edge_index, with_halo(scale, route)[row] * edge_weight * scale[col]


class GCNConv(pyg_nn.GCNConv):
    r"""The graph convolution of `"Semi-supervised Classification with Graph Convolutional Networks"
    <https://arxiv.org/abs/1609.02907>`_, partition-parallel.

    .. math::
        \mathbf{X}^{\prime} = \mathbf{\hat{D}}^{-1/2} \mathbf{\hat{A}} \mathbf{\hat{D}}^{-1/2} \mathbf{X}
        \mathbf{\Theta}

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.GCNConv`. Rows travel
    after the linear map. With :obj:`cached=True` the normalised edges of the first call are kept, which saves
    the exchange of degrees later.

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`, edge weights :math:`(E)`
          *(optional)*
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    _cached_edge_index: tuple[Tensor, Tensor] | None
    propagate_type = {"x": tuple[Tensor, Tensor], "edge_weight": OptTensor}

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        check_flow(self, self.flow)

    def forward(
        self, x: Tensor, edge_index: Tensor, route: Route | None = None, edge_weight: Tensor | None = None
    ) -> Tensor:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor): The rows of the owned nodes.
            edge_index (torch.Tensor): The share's edges.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            edge_weight (torch.Tensor, optional): A weight for each edge.
        """
        check_edges(self, x, edge_index, edge_weight=edge_weight)
        if self.normalize:
            normalised = self._cached_edge_index
            if normalised is None:
                if self.add_self_loops:
                    check_owned_first(self, route)
                num_nodes = x.size(0) if route is None else route.num_owned
                normalised = gcn_norm(
                    edge_index, edge_weight, num_nodes, route, self.improved, self.add_self_loops, x.dtype
                )
                if self.cached:
                    self._cached_edge_index = normalised
            edge_index, edge_weight = normalised
        x = self.lin(x)
        out: Tensor = self.propagate(edge_index, x=(with_halo(x, route), x), edge_weight=edge_weight)
        return out if self.bias is None else out + self.bias
