r"""The heterogeneous graph transformer, partition-parallel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor

from partpar.graph import EdgeType
from partpar.hetero_route import HeteroRoute
from partpar.kernels.aggregate import aggregate_softmax
from partpar.kernels.linear import edge_dot
from partpar.nn.hetero_rows import HeteroEdges, HeteroRows, adjacency, check_relations, join, sources
from partpar.nn.rows import check_flow, owned
from partpar.route import Route


class HGTConv(pyg_nn.HGTConv):
    r"""The operator of `"Heterogeneous Graph Transformer" <https://arxiv.org/abs/2003.01332>`_, partition-parallel.

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.HGTConv`. The softmax of a node
    runs over its in-edges of all relations, which its owner has. Rows of all types travel in one exchange, before
    they are mapped, and no message per edge is made.

    Parameters that no output depends on, those of the outputs of types without a relation into them, require no gradient:
    :class:`~torch.nn.parallel.DistributedDataParallel` would wait for theirs.

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})` and edges :math:`(2, E)` by type
        - **outputs:** :math:`(N_{owned}, F_{out})` for each type that is some edge type's destination
    """

    propagate_type = {"k": Tensor, "q": Tensor, "v": Tensor, "edge_attr": Tensor}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_flow(self, self.flow)
        for node_type in self.node_types:
            made = node_type in self.dst_node_types
            self.out_lin.lins[node_type].requires_grad_(made)
            skips = self.in_channels.get(node_type) in (-1, self.out_channels)  # -1: not known yet
            self.skip[node_type].requires_grad_(made and skips)

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
        rows = sources(x_dict, routes, [e[0] for e in used])
        keys_values = {t: self._heads(t, x, (0, 2)) for t, x in rows.items()}
        out = {}
        for node_type in x_dict:
            if node_type not in self.dst_node_types:
                continue
            x = owned(x_dict[node_type])
            attended = self._attend(node_type, x, keys_values, used)
            made = self.out_lin.lins[node_type](F.gelu(attended))
            if made.size(-1) == x.size(-1):
                keep = self.skip[node_type].sigmoid()
                made = keep * made + (1 - keep) * x
            out[node_type] = made
        return out

    def _heads(self, node_type: str, x: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        """``[N, H, D]`` of keys (0), queries (1) or values (2): only those that are needed of a row are made."""
        lin = self.kqv_lin.lins[node_type]
        weights = lin.weight.split(self.out_channels)
        biases = [None] * 3 if lin.bias is None else lin.bias.split(self.out_channels)
        return [F.linear(x, weights[i], biases[i]).view(x.size(0), self.heads, self.out_channels // self.heads) for i in which]

    def _attend(
        self, node_type: str, x: Tensor, keys_values: dict[str, list[Tensor]], used: HeteroEdges
    ) -> Tensor:
        """``[num_owned, F]``: attention over the in-edges of all relations."""
        relations: list[EdgeType] = [e for e in used if e[2] == node_type]
        (query,) = self._heads(node_type, x, (1,))
        if not relations:
            return x.new_zeros(x.size(0), self.out_channels) + 0 * query.sum()
        pieces = []
        keys, values = [], []
        for relation in relations:
            key, value = keys_values[relation[0]]
            keys.append(self._map(self.k_rel.weight, relation, key))
            values.append(self._map(self.v_rel.weight, relation, value))
            pieces.append(adjacency(used[relation], key.size(0), x.size(0)))
        adj, number = join(pieces)
        prior = torch.cat([self.p_rel["__".join(relation)] for relation in relations])
        logits = edge_dot(adj, query.contiguous(), torch.cat(keys).contiguous()) * prior[number]
        out = aggregate_softmax(adj, torch.cat(values), logits / math.sqrt(query.size(-1)))
        return out.flatten(1)

    def _map(self, weight: Tensor, relation: EdgeType, rows: Tensor) -> Tensor:
        """The relation's own map of each head."""
        of_heads = weight.view(self.heads, len(self.edge_types), *weight.shape[1:])
        return torch.einsum("nhd,hde->nhe", rows, of_heads[:, self.edge_types_map[relation]])
