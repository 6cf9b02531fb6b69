r"""Graph convolution whose degrees are those of the whole graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptTensor
from torch_geometric.utils import add_remaining_self_loops, scatter

from partpar.kernels.adjacency import Adjacency
from partpar.nn.neighbour_sum import Edges
from partpar.nn.neighbourhood import edge_index_of, kept, sum_neighbours, sum_of, with_self_loops
from partpar.nn.rows import (
    Rows,
    check_edges,
    check_flow,
    check_owned_first,
    of_block,
    owned,
    through,
    with_halo,
)
from partpar.nn.source_rows import SourceRows
from partpar.nn.streamed import Stages, stages_of
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


@dataclass(frozen=True, eq=False)
class NormalisedSum:
    r"""The product with the normalised adjacency matrix, ``scale * (A (scale * x))``.

    Args:
        adj: The edges, with self-loops.
        weight: ``[E]``, or :obj:`None` for ones.
        scale: ``[num_src]``, degrees to the power of -1/2; :obj:`None` for ones.
    """

    adj: Adjacency
    weight: Tensor | None
    scale: Tensor | None

    def __call__(self, x: Tensor, route: Route | None) -> Tensor:
        r"""``[num_owned, C]`` from the rows of the owned nodes (collective)."""
        if self.scale is None:
            return sum_neighbours(self.adj, x, route, self.weight)
        scale = self.scale[: self.adj.num_dst].unsqueeze(1)
        return sum_neighbours(self.adj, x * scale, route, self.weight) * scale

    def of_sources(self, x: Tensor) -> Tensor:
        r"""The same from the rows of all sources, without an exchange."""
        edges = Edges(self.adj, self.weight)
        if self.scale is None:
            return edges.sum(x)
        scale = self.scale.unsqueeze(1)
        return edges.sum(x * scale) * scale[: self.adj.num_dst]

    @cached_property
    def entries(self) -> Tensor | None:
        r"""``[E]``, the entries of the normalised adjacency matrix."""
        if self.scale is None:
            return self.weight
        entries = self.scale[: self.adj.num_dst].repeat_interleave(
            self.adj.degrees, output_size=self.adj.num_edges
        )
        entries *= self.scale.index_select(0, self.adj.indices)
        return entries if self.weight is None else entries.mul_(self.weight)


def normalised_sum(
    adj: Adjacency,
    edge_weight: Tensor | None,
    route: Route | None,
    improved: bool,
    add_self_loops: bool,
    dtype: torch.dtype,
) -> NormalisedSum:
    r"""What :func:`gcn_norm` does, as constants of an adjacency (collective: halo degrees are fetched, once)."""
    weight = None if edge_weight is None else edge_weight.to(dtype)
    if weight is not None and adj.edge_ids is not None:
        weight = weight[adj.edge_ids]
    if add_self_loops:
        fill = 2.0 if improved else 1.0
        looped = with_self_loops(adj)
        if weight is not None or improved:
            given = torch.ones(adj.num_edges, dtype=dtype, device=adj.device) if weight is None else weight
            of_loops = given.new_full((adj.num_dst,), fill)
            of_loops[adj.indices[~looped.stays].long()] = given[~looped.stays]  # a loop keeps its own weight
            weight = looped.per_edge(given, of_loops)
        adj = looped.adj
    if weight is None:
        degree = adj.degrees.to(dtype)
    else:
        degree = torch.zeros(adj.num_dst, dtype=dtype, device=adj.device).index_add_(
            0, adj.destinations, weight
        )
    scale = degree.pow(-0.5)
    scale = scale.masked_fill(scale == float("inf"), 0.0)
    return NormalisedSum(adj, weight, with_halo(scale, route))


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
        self,
        x: Rows,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor or SourceRows): The rows of the owned nodes, or constant rows with their halo.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            edge_weight (torch.Tensor, optional): A weight for each edge.
        """
        x = of_block(x, edge_index, route)
        check_edges(self, x, edge_index, route, edge_weight=edge_weight)
        if isinstance(x, tuple) and self.normalize:
            raise ValueError(
                "GCNConv: expected normalize=False for a sampled block, which does not know the degrees of its sources; "
                "weigh its edges, call the layer with the batch's edge_index, or use SAGEConv"
            )
        if isinstance(edge_index, Adjacency):
            if edge_weight is None or not edge_weight.requires_grad:
                return self._by_kernel(x, edge_index, route, edge_weight)
            edge_index = edge_index_of(edge_index)
        if self.normalize:
            normalised = self._cached_edge_index
            if normalised is None:
                if self.add_self_loops:
                    check_owned_first(self, route)
                rows = owned(x)
                normalised = gcn_norm(
                    edge_index,
                    edge_weight,
                    rows.size(0),
                    route,
                    self.improved,
                    self.add_self_loops,
                    rows.dtype,
                )
                if self.cached:
                    self._cached_edge_index = normalised
            edge_index, edge_weight = normalised
        out: Tensor = self.propagate(edge_index, x=through(self.lin, x, route), edge_weight=edge_weight)
        return self._with_bias(out)

    def _by_kernel(self, x: Rows, adj: Adjacency, route: Route | None, edge_weight: Tensor | None) -> Tensor:
        """Linear map and sum commute: the narrower side of the map is summed, and travels."""
        dtype = owned(x).dtype
        norm = self._norm(adj, route, edge_weight, dtype)
        if isinstance(x, SourceRows):
            # A sum of constant rows is made once and needs no backward pass, so it may be somewhat wider.
            if self.in_channels <= 2 * self.out_channels:
                out = self.lin(
                    x.keep(norm, lambda: norm.of_sources(x.rows) if x.fetched else norm(x.owned, route))
                )
            else:
                out = norm.of_sources(self.lin(x.rows))
        elif isinstance(x, tuple):
            wider = self.in_channels < self.out_channels
            out = self.lin(norm.of_sources(x[0])) if wider else norm.of_sources(self.lin(x[0]))
        elif self.in_channels < self.out_channels:
            out = self.lin(norm(x, route))
        else:
            out = norm(self.lin(x), route)
        return self._with_bias(out)

    @property
    def streams(self) -> bool:
        r"""Whether :meth:`stages` may be called."""
        return not isinstance(self.lin.weight, torch.nn.UninitializedParameter)

    def stages(
        self, x: Tensor | SourceRows, adj: Adjacency, route: Route | None, edge_weight: Tensor | None = None
    ) -> Stages:
        r"""The layer in a form that may go over its rows piece by piece (collective)."""
        check_edges(self, x, adj, route, edge_weight=edge_weight)
        norm = self._norm(adj, route, edge_weight, owned(x).dtype)
        constant = isinstance(x, SourceRows)
        if self.in_channels <= (2 if constant else 1) * self.out_channels:
            plan = sum_of(norm.adj, route, norm.entries)
            return stages_of(plan, x, lambda total, *_: self._with_bias(self.lin(total)))

        def after(total: Tensor, *_: Any) -> Tensor:
            return self._with_bias(total)

        if isinstance(x, SourceRows):
            return Stages(Edges(norm.adj, norm.entries), after, self.lin, sources=x.rows)
        return Stages(sum_of(norm.adj, route, norm.entries), after, self.lin)

    def _with_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias

    def _norm(
        self, adj: Adjacency, route: Route | None, edge_weight: Tensor | None, dtype: torch.dtype
    ) -> NormalisedSum:
        if not self.normalize:
            return NormalisedSum(adj, edge_weight, None)
        weight = None if edge_weight is None else (id(edge_weight), edge_weight._version)
        name = ("gcn norm", weight, self.improved, self.add_self_loops, dtype)

        def build() -> tuple[Tensor | None, NormalisedSum]:
            return edge_weight, normalised_sum(
                adj, edge_weight, route, self.improved, self.add_self_loops, dtype
            )

        norm: NormalisedSum = kept(adj, route, name, build)[
            1
        ]  # with the weight, so that its id stays its own
        return norm
