r"""The relational graph convolution, partition-parallel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptTensor

from partpar.graph import EdgeType
from partpar.hetero_route import HeteroRoute
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.aggregate import aggregate_max, aggregate_mean, aggregate_min, aggregate_sum
from partpar.nn.hetero_rows import (
    HeteroEdges,
    HeteroRows,
    adjacency,
    check_relations,
    join,
    join_means,
    sources,
)
from partpar.nn.products import stacked_products
from partpar.nn.rows import check_flow, owned
from partpar.nn.source_rows import SourceRows
from partpar.route import Route

_REDUCTIONS = {
    "mean": aggregate_mean,
    "sum": aggregate_sum,
    "add": aggregate_sum,
    "max": aggregate_max,
    "min": aggregate_min,
}
_EDGE = 12  # what an element of an edge's row costs to add, in multiplications of a matrix product (measured)


class _Relation(NamedTuple):
    """Edges, the rows given for their sources, these rows with their halo, and the relation's weight."""

    adj: Adjacency
    given: Tensor | SourceRows
    rows: Tensor
    weight: Tensor


class RGCNConv(pyg_nn.RGCNConv):
    r"""The operator of `"Modeling Relational Data with Graph Convolutional Networks"
    <https://arxiv.org/abs/1703.06103>`_ over the edge types of a typed graph, partition-parallel.

    .. math::
        \mathbf{x}^{\prime}_i = \mathbf{\Theta}_{root} \cdot \mathbf{x}_i + \sum_{r} \mathbf{\Theta}_r \cdot
        \mathrm{mean}_{j \in \mathcal{N}_r(i)} \mathbf{x}_j

    Parameters and ``state_dict`` are those of :class:`torch_geometric.nn.RGCNConv` over the same graph by
    ``to_homogeneous()``, where relation ``i`` is the i-th edge type and all types have rows of one width. The rows of all
    types travel in one exchange, and no message per edge is made. A graph of one type with a number for each
    edge's relation is served by ``RoutedConv(torch_geometric.nn.RGCNConv(...))``.

    Args:
        in_channels (int): Size of each input row, of every type.
        out_channels (int): Size of each output row.
        edge_types (list): The edge types, in the order of their numbers.
        *args (optional): Further arguments of :class:`torch_geometric.nn.RGCNConv` after the number of relations.
        **kwargs (optional): The same, by name.

    Raises:
        ValueError: :obj:`aggr` is not ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``, or :obj:`flow` is not
            ``"source_to_target"``.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})` and edges :math:`(2, E)` by type
        - **outputs:** :math:`(N_{owned}, F_{out})` for every type given
    """

    propagate_type = {"x": Tensor, "edge_type_ptr": OptTensor}

    def __init__(
        self, in_channels: int, out_channels: int, edge_types: list[EdgeType], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, len(edge_types), *args, **kwargs)
        check_flow(self, self.flow)
        if self.aggr not in _REDUCTIONS:
            raise ValueError(f"RGCNConv: expected aggr to be one of {', '.join(_REDUCTIONS)}, found {self.aggr!r}")
        self.edge_types = list(edge_types)

    def forward(
        self,
        x_dict: HeteroRows,
        edge_index_dict: HeteroEdges,
        route: HeteroRoute | Route | None = None,
    ) -> dict[str, Tensor]:
        r"""Runs the layer on owned rows (collective).

        Args:
            x_dict: The rows of the owned nodes of each type, or constant rows with their halo.
            edge_index_dict: The share's edges; ``share.adj_dict()`` is the fast way.
            route (HeteroRoute, optional): The share's route; :obj:`None` when one process owns everything.
        """
        used = {e: edge_index_dict[e] for e in self.edge_types if e in edge_index_dict}
        routes = check_relations(self, x_dict, used, route)
        out = {t: self._own(owned(given)) for t, given in x_dict.items()}
        weight = self.weight
        if self.num_bases is not None:
            weight = (self.comp @ weight.flatten(1)).view(-1, *weight.shape[1:])

        rows_of = sources(x_dict, routes, [e[0] for e in used])
        constant: dict[str, list[_Relation]] = {}
        multiplied: dict[str, list[_Relation]] = {}
        for number, edge_type in enumerate(self.edge_types):
            if edge_type not in used:
                continue
            source, _, destination = edge_type
            rows, num_dst = rows_of[source], out[destination].size(0)
            adj = adjacency(used[edge_type], rows.size(0), num_dst)
            relation = _Relation(adj, x_dict[source], rows, weight[number])
            if self._keeps(relation) and self.num_blocks is None:
                constant.setdefault(destination, []).append(relation)
            elif self._multiplies_first(relation):
                multiplied.setdefault(destination, []).append(relation)
            else:
                self._add(out[destination], relation)
        for destination, relations in constant.items():
            self._add_constant(out[destination], relations)
        for destination, relations in multiplied.items():
            self._add_multiplied(out[destination], relations)
        return out

    def _own(self, rows: Tensor) -> Tensor:
        """What a node's own row and the bias make, to which relations are added."""
        if self.root is not None:
            return rows @ self.root if self.bias is None else torch.addmm(self.bias, rows, self.root)
        zeros = rows.new_zeros(rows.size(0), self.out_channels)
        return zeros if self.bias is None else zeros + self.bias

    def _keeps(self, relation: _Relation) -> bool:
        """Whether the aggregates of constant rows are kept: unless they are wide, and their product is not."""
        return isinstance(relation.given, SourceRows) and self.in_channels_l <= 2 * self.out_channels

    def _multiplies_first(self, relation: _Relation) -> bool:
        """Whether sources are multiplied rather than aggregates. A sum and a linear map commute: whichever moves and
        multiplies less comes first."""
        if self.aggr in ("max", "min") or self.num_blocks is not None:
            return False
        adj, matrix = relation.adj, self.in_channels_l * self.out_channels
        before = adj.num_src * matrix + _EDGE * adj.num_edges * self.out_channels
        return before < adj.num_dst * matrix + _EDGE * adj.num_edges * self.in_channels_l

    def _add(self, out: Tensor, relation: _Relation) -> None:
        """Adds one relation whose aggregates are multiplied, in place."""
        reduce = _REDUCTIONS[str(self.aggr)]
        adj, given, rows, weight = relation
        if isinstance(given, SourceRows) and self._keeps(relation):
            mean = given.keep((self.aggr, id(adj)), lambda: reduce(adj, rows))
        else:
            mean = reduce(adj, rows)
        if self.num_blocks is None:
            out.addmm_(mean.to(out.dtype), weight.to(out.dtype))  # under autocast, `out` is narrow
            return
        blocks = torch.einsum("nbi,bio->nbo", mean.view(-1, *weight.shape[:2]), weight)
        out.add_(blocks.reshape(-1, self.out_channels))

    def _add_constant(self, out: Tensor, relations: list[_Relation]) -> None:
        """Adds relations from constant rows, in one product, in place: their aggregates are kept side by side."""
        reduce = _REDUCTIONS[str(self.aggr)]
        first, *others = (r.given for r in relations if isinstance(r.given, SourceRows))
        name = (self.aggr, *(id(r.adj) for r in relations))
        means = first.keep(name, lambda: torch.cat([reduce(r.adj, r.rows) for r in relations], dim=1), *others)
        # Transposed, so that the gradient of the weights is a product of the faster kind: few long rows by a wide matrix.
        weights = torch.cat([relation.weight.t() for relation in relations], dim=1).t()
        out.addmm_(means.to(out.dtype), weights.to(out.dtype))

    def _add_multiplied(self, out: Tensor, relations: list[_Relation]) -> None:
        """Adds relations whose sources are multiplied, in one aggregation, in place."""
        adjs = [relation.adj for relation in relations]
        rows = [relation.rows.to(out.dtype) for relation in relations]
        products = stacked_products(rows, [relation.weight.to(out.dtype) for relation in relations])
        whole, shares = join_means(adjs, out.dtype) if self.aggr == "mean" else (join(adjs)[0], None)
        out.add_(aggregate_sum(whole, products, shares))
