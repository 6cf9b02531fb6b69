r"""GraphSAGE, partition-parallel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptPairTensor

from partpar.kernels.adjacency import Adjacency
from partpar.kernels.aggregate import aggregate_max, aggregate_min, aggregate_sum_and_head
from partpar.nn.neighbour_sum import Edges
from partpar.nn.neighbourhood import edge_index_of, sum_neighbours, sum_of
from partpar.nn.rows import Rows, check_edges, check_flow, of_block, owned, through, with_halo
from partpar.nn.source_rows import SourceRows
from partpar.nn.streamed import Stages, stages_of
from partpar.route import Route


class SAGEConv(pyg_nn.SAGEConv):
    r"""The GraphSAGE operator of `"Inductive Representation Learning on Large Graphs"
    <https://arxiv.org/abs/1706.02216>`_, partition-parallel.

    .. math::
        \mathbf{x}^{\prime}_i = \mathbf{W}_1 \mathbf{x}_i + \mathbf{W}_2 \cdot \mathrm{mean}_{j \in
        \mathcal{N(i)}}
        \mathbf{x}_j

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.SAGEConv`; every
    aggregation of PyG that copes with a worker without nodes may be used.

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``, or :obj:`aggr` is ``"lstm"``, which fails on a
            worker without edges.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    propagate_type = {"x": OptPairTensor}

    def __init__(
        self, in_channels: int | tuple[int, int], out_channels: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        check_flow(self, self.flow)
        if any(isinstance(module, pyg_nn.LSTMAggregation) for module in self.modules()):
            raise ValueError(
                "SAGEConv: expected an aggregation that takes no edges for an answer, found 'lstm', which "
                "fails on a worker without edges; use 'mean', 'max' or another"
            )

    def forward(self, x: Rows, edge_index: Tensor | Adjacency, route: Route | None = None) -> Tensor:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor or SourceRows): The rows of the owned nodes, or constant rows with their halo; those of all
                sources of a sampled block, or a pair of its sources' and destinations'.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way. Or a block.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
        """
        given, x = x, of_block(x, edge_index, route)
        check_edges(self, x, edge_index, route)
        if isinstance(edge_index, Adjacency):
            if isinstance(given, Tensor) and isinstance(x, tuple) and self._sums_first(x[0], edge_index):
                total, root = aggregate_sum_and_head(edge_index, given)
                return self._with_root(self.lin_l(self._mean(total, edge_index)), root)
            out = self._by_kernel(x, edge_index, route)
        else:
            pair = (through(self._project, x, route)[0], owned(x))
            out = self.lin_l(self.propagate(edge_index, x=pair))
        return self._with_root(out, owned(x))

    def _with_root(self, out: Tensor, x: Tensor) -> Tensor:
        if self.root_weight:
            out = self.lin_r(x).add_(out)  # in place: it is as large as the layer's output
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out

    @property
    def streams(self) -> bool:
        r"""Whether :meth:`stages` may be called."""
        lazy = any(isinstance(p, torch.nn.UninitializedParameter) for p in self.parameters())
        return type(self.aggr_module) in (pyg_nn.MeanAggregation, pyg_nn.SumAggregation) and not lazy

    def stages(self, x: Tensor | SourceRows, adj: Adjacency, route: Route | None) -> Stages:
        r"""The layer in a form that may go over its rows piece by piece (collective)."""
        check_edges(self, x, adj, route)
        rows = owned(x)
        is_mean = type(self.aggr_module) is pyg_nn.MeanAggregation
        scale = adj.degrees.clamp(min=1).to(rows.dtype).reciprocal().unsqueeze(1) if is_mean else None
        constant, width = isinstance(x, SourceRows), rows.size(1)
        map_first = self.out_channels < width and not (constant and width <= 2 * self.out_channels)
        if not (map_first or self.project):
            return stages_of(
                sum_of(adj, route),
                x,
                lambda total, rows, _: self._with_root(self.lin_l(total), rows),
                scale=scale,
            )

        def before(rows: Tensor) -> Tensor:
            rows = self._project(rows)
            return F.linear(rows, self.lin_l.weight) if map_first else rows

        def after(total: Tensor, rows: Tensor, _: Route) -> Tensor:
            if not map_first:
                return self._with_root(self.lin_l(total), rows)
            return self._with_root(total if self.lin_l.bias is None else total + self.lin_l.bias, rows)

        if isinstance(x, SourceRows):
            return Stages(Edges(adj), after, before, scale, x.rows)
        return Stages(sum_of(adj, route), after, before, scale)

    def _project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.lin(x).relu() if self.project else x
        return projected

    def _by_kernel(self, x: Rows, adj: Adjacency, route: Route | None) -> Tensor:
        """Aggregates and maps; a sum and a linear map commute, so the narrower side travels."""
        kind = type(self.aggr_module)
        if kind in (pyg_nn.MaxAggregation, pyg_nn.MinAggregation):
            extreme = aggregate_max if kind is pyg_nn.MaxAggregation else aggregate_min
            return self.lin_l(extreme(adj, through(self._project, x, route)[0]))
        if kind not in (pyg_nn.MeanAggregation, pyg_nn.SumAggregation):
            pair = (through(self._project, x, route)[0], owned(x))
            return self.lin_l(self.propagate(edge_index_of(adj), x=pair))

        width = owned(x).size(1)
        if isinstance(x, SourceRows) and not self.project and width <= 2 * self.out_channels:
            # A sum of constant rows is made once and needs no backward pass, so it may be somewhat wider.
            return self.lin_l(x.keep((kind, id(adj)), lambda: self._mean(sum_neighbours(adj, x.owned, route), adj)))
        of_sources = isinstance(x, SourceRows | tuple)
        rows = self._project(with_halo(x, None) if isinstance(x, SourceRows | tuple) else x)
        map_first = self.out_channels < width and not (isinstance(x, tuple) and _many_sources(adj))
        rows = F.linear(rows, self.lin_l.weight) if map_first else rows
        out = self._mean(Edges(adj).sum(rows) if of_sources else sum_neighbours(adj, rows, route), adj)
        if not map_first:
            return self.lin_l(out)
        return out if self.lin_l.bias is None else out + self.lin_l.bias

    def _mean(self, total: Tensor, adj: Adjacency) -> Tensor:
        """Of a sum that nobody else has, unless sums are wanted."""
        if type(self.aggr_module) is pyg_nn.SumAggregation:
            return total
        return total.div_(adj.degrees.clamp(min=1).to(total.dtype).unsqueeze(1))

    def _sums_first(self, sources: Tensor, adj: Adjacency) -> bool:
        """Whether a block's rows are summed, in need of gradients, and then mapped."""
        if type(self.aggr_module) not in (pyg_nn.MeanAggregation, pyg_nn.SumAggregation) or self.project:
            return False
        return sources.requires_grad and (self.out_channels >= sources.size(1) or _many_sources(adj))


def _many_sources(adj: Adjacency) -> bool:
    """A map of many sources of a block, for few destinations, costs more than the sum of wider rows."""
    return adj.num_src > 2 * adj.num_dst
