r"""Small things by the names of ``torch_geometric.distributed.utils``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.sampler import SamplerOutput

from partpar.graph import EdgeType


@dataclass
class DistEdgeHeteroSamplerInput:
    r"""Seeds of two node types, the ends of links.

    Args:
        input_id: Places of the links among the inputs.
        node_dict: Raw ids by node type.
        time_dict: Times by node type.
        input_type: Of the links.
    """

    input_id: Tensor | None
    node_dict: dict[str, Tensor]
    time_dict: dict[str, Tensor] | None = None
    input_type: EdgeType | None = None


class _ByHop:
    def __init__(self, node_types: Iterable[str], num_hops: int) -> None:
        kinds = list(node_types)
        none = torch.empty(0, dtype=torch.int64)
        self.src: dict[str, list[Tensor]] = {t: [none] * (num_hops + 1) for t in kinds}
        self.with_dupl: dict[str, Tensor] = dict.fromkeys(kinds, none)
        self.out: dict[str, Tensor] = dict.fromkeys(kinds, none)


class NodeDict(_ByHop):
    r"""Nodes by type: ``src``, where each hop begins; ``with_dupl``, all that was drawn; ``out``, each once; and
    ``seed_time``, the times of each hop."""

    def __init__(self, node_types: Iterable[str], num_hops: int) -> None:
        super().__init__(node_types, num_hops)
        none = torch.empty(0, dtype=torch.int64)
        self.seed_time: dict[str, list[Tensor]] = {t: [none] * num_hops for t in self.src}


class BatchDict(_ByHop):
    r"""The same for the sub-graphs that nodes belong to."""


def remove_duplicates(
    out: SamplerOutput, node: Tensor, batch: Tensor | None = None, disjoint: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    r"""Adds drawn nodes to those known, each once and in the order of discovery.

    Args:
        out: What was drawn: ``out.node``, and ``out.batch`` of disjoint sub-graphs.
        node: ``[n]``, the nodes known.
        batch: ``[n]``, the sub-graph of each.
        disjoint: Whether a node may be in several sub-graphs.

    Returns:
        New nodes, all nodes, and the sub-graphs of both (:obj:`None` unless disjoint).
    """
    nodes = torch.cat([node, out.node])
    groups = torch.cat([batch, out.batch]) if disjoint and batch is not None else torch.zeros_like(nodes)
    pairs, place = torch.stack([groups, nodes]).unique(dim=1, return_inverse=True)
    first = torch.full((pairs.size(1),), nodes.numel()).scatter_reduce_(0, place, torch.arange(nodes.numel()), "amin")
    at = first.sort().values
    found, known = nodes[at], node.numel()
    if not disjoint:
        return found[known:], found, None, None
    return found[known:], found, groups[at][known:], groups[at]


def filter_dist_store(
    feature_store: Any,
    graph_store: Any,
    node_dict: Mapping[str, Tensor],
    row_dict: Mapping[EdgeType, Tensor],
    col_dict: Mapping[EdgeType, Tensor],
    edge_dict: Mapping[EdgeType, Tensor | None],
    custom_cls: Any = None,
    meta: Sequence[Any] | None = None,
    input_type: Any = None,
) -> HeteroData:
    r"""Puts a sampled heterogeneous graph together.

    Args:
        feature_store, graph_store: Means nothing here: types are those of the dictionaries.
        node_dict: Nodes by type.
        row_dict, col_dict: Edges by type.
        edge_dict: Their ids by type.
        custom_cls: Made instead of :class:`~torch_geometric.data.HeteroData`.
        meta: Whose last three are node features, labels and edge features by type, or :obj:`None`.
        input_type: Of the labels.
    """
    data: HeteroData = HeteroData() if custom_cls is None else custom_cls()
    features, labels, edge_features = (meta or (None, None, None))[-3:]
    for edge_type, row in row_dict.items():
        data[edge_type].edge_index = torch.stack([row, col_dict[edge_type]])
        if edge_features and edge_features.get(edge_type) is not None:
            data[edge_type].edge_attr = edge_features[edge_type]
    for node_type, node in node_dict.items():
        data[node_type].num_nodes = node.numel()
        if features and features.get(node_type) is not None:
            data[node_type].x = features[node_type]
    if labels:
        data[input_type].y = labels[input_type]
    return data


def as_str(inputs: Any) -> str:
    r"""A node type, or an edge type joined by underscores."""
    if isinstance(inputs, str):
        return inputs
    return "__".join(inputs) if isinstance(inputs, (list, tuple)) and len(inputs) == 3 else ""


def reverse_edge_type(etype: EdgeType) -> EdgeType:
    r"""The type that leads back, by PyG's names."""
    src, name, dst = etype
    if src != dst:
        name = name.removeprefix("rev_") if name.startswith("rev_") else f"rev_{name}"
    return dst, name, src
