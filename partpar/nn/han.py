r"""The heterogeneous graph attention network, partition-parallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import PairTensor

from partpar import exchange
from partpar.graph import EdgeType
from partpar.hetero_route import HeteroRoute
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.aggregate import aggregate_gat
from partpar.nn.dropout import AttentionDropout
from partpar.nn.hetero_rows import HeteroEdges, HeteroRows, adjacency, check_relations, sources
from partpar.nn.rows import owned
from partpar.nn.source_rows import SourceRows
from partpar.route import Route

SemanticAttention = tuple[dict[str, Tensor | None], dict[str, Tensor | None]]


class HANConv(AttentionDropout, pyg_nn.HANConv):
    r"""The operator of `"Heterogeneous Graph Attention Network" <https://arxiv.org/abs/1903.07293>`_,
    partition-parallel.

    Arguments and parameters are those of :class:`torch_geometric.nn.HANConv`, as is the ``state_dict`` but for the step
    counter of attention dropout, whose draws are keyed by the raw ids of both ends. Attention over nodes needs the
    in-edges of owned nodes alone; the semantic attention that weighs relations averages over all nodes of a type, which
    is one small reduction for all types.

    Args:
        *args (optional): Arguments of :class:`torch_geometric.nn.HANConv`.
        **kwargs (optional): The same, by name.
        seed (int, optional): The seed of attention dropout. (default: :obj:`0`)
        layer (int, optional): The layer's number for attention dropout, see :class:`~partpar.nn.Dropout`.
            (default: :obj:`None`)

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})` and edges :math:`(2, E)` by type
        - **outputs:** :math:`(N_{owned}, F_{out})` by type, :obj:`None` for types without a relation into them
    """

    propagate_type = {"x": PairTensor, "alpha": PairTensor}

    def forward(
        self,
        x_dict: HeteroRows,
        edge_index_dict: HeteroEdges,
        route: HeteroRoute | Route | None = None,
        return_semantic_attention_weights: bool = False,
    ) -> dict[str, Tensor | None] | SemanticAttention:
        r"""Runs the layer on owned rows (collective).

        Args:
            x_dict: The rows of the owned nodes of each type, or constant rows with their halo.
            edge_index_dict: The share's edges; ``share.adj_dict()`` is the fast way.
            route (HeteroRoute, optional): The share's route; :obj:`None` when one process owns everything.
            return_semantic_attention_weights (bool, optional): Whether to return the weights of relations too.
        """
        known = {tuple(e) for e in self.metadata[1]}
        used = {e: piece for e, piece in edge_index_dict.items() if e in known}
        routes = check_relations(self, x_dict, used, route)
        src_types = {e[0] for e in used}
        projected: dict[str, Tensor | SourceRows] = {}
        mapped: dict[str, Tensor] = {}  # of constant rows, whose halo is here already
        for node_type, x in x_dict.items():
            if isinstance(x, SourceRows) and node_type in src_types:
                mapped[node_type] = self.proj[node_type](x.rows)
                projected[node_type] = mapped[node_type][: x.owned.size(0)]
            else:
                projected[node_type] = self.proj[node_type](owned(x))
        of_sources = mapped | sources(projected, routes, sorted(src_types - set(mapped)))

        outs: dict[str, list[Tensor]] = {t: [] for t in x_dict}
        for edge_type, piece in used.items():
            source, _, destination = edge_type
            x_src, x_dst = self._heads(of_sources[source]), self._heads(owned(projected[destination]))
            adj = adjacency(piece, x_src.size(0), x_dst.size(0))
            name = "__".join(edge_type)
            out = aggregate_gat(
                adj,
                x_src,
                (x_src * self.lin_src[name]).sum(-1),
                (x_dst * self.lin_dst[name]).sum(-1),
                None,
                self.negative_slope,
                self._dropped(adj, edge_type, routes, x_src),
            )
            outs[destination].append(F.relu(out.flatten(1)))
        out_dict, weights = self._combine(outs, routes)
        return (out_dict, weights) if return_semantic_attention_weights else out_dict

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), self.heads, self.out_channels // self.heads)

    def _dropped(
        self, adj: Adjacency, edge_type: EdgeType, routes: HeteroRoute | None, x: Tensor
    ) -> Tensor | None:
        if not self.training or self.dropout == 0.0:
            return None
        ends = adj.indices.long(), adj.destinations.long()
        if routes is not None:
            ends = routes[edge_type[0]].raw_ids[ends[0]], routes[edge_type[2]].raw_ids[ends[1]]
        return self.attention_dropout.drop_pairs(x.new_ones(adj.num_edges, self.heads), *ends)

    def _combine(self, outs: dict[str, list[Tensor]], routes: HeteroRoute | None) -> SemanticAttention:
        """Relations weighed by how they suit the nodes of a type on average, taken over all workers."""
        stacked = {t: torch.stack(rows) for t, rows in outs.items() if rows}
        group = None if routes is None else routes.group
        sums = {t: torch.tanh(self.k_lin(rows)).sum(1) for t, rows in stacked.items()}  # [relations, C]
        if not sums:
            return dict.fromkeys(outs), dict.fromkeys(outs)
        counts = next(iter(sums.values())).new_tensor([rows.size(1) for rows in stacked.values()])
        whole = exchange.all_reduce_sum(torch.cat([*(s.flatten() for s in sums.values()), counts]), group)
        *parts, counts = whole.split([*(s.numel() for s in sums.values()), len(sums)])
        out: dict[str, Tensor | None] = dict.fromkeys(outs)
        weights: dict[str, Tensor | None] = dict.fromkeys(outs)
        for (t, total), part, count in zip(sums.items(), parts, counts, strict=True):
            means = part.view_as(total) / count.clamp(min=1)
            weights[t] = weight = F.softmax((self.q * means).sum(-1), dim=0)
            out[t] = (weight.view(-1, 1, 1) * stacked[t]).sum(0)
        return out, weights
