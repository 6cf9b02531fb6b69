r"""All parts of a partition in one process, behind one service: what sampling over parts is compared on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from partpar import GraphData
from partpar.graph import EdgeType
from partpar.serving.hop import HopReply, HopRequest, answer_hop
from partpar.serving.local import Answered


class AllParts:
    r"""Splits each request by owner, as a service over processes does; messages go through their wire form."""

    def __init__(self, shares: list[GraphData], part_id: int = 0) -> None:
        self.shares, self.part_id, self.num_parts = shares, part_id, len(shares)
        self.node_types, self.edge_types = shares[0].node_types, shares[0].edge_types
        self._ids: dict[str, Tensor] = {}
        for node_type in self.node_types:
            raw = torch.cat([share.node(node_type)["raw_ids"] for share in shares])
            self._ids[node_type] = torch.empty_like(raw)
            self._ids[node_type][raw] = torch.arange(raw.numel())
        self.asked = 0

    def offsets(self, node_type: str) -> Tensor:
        return self.shares[0].offsets(node_type)

    def hop_begin(self, requests: Mapping[EdgeType, HopRequest]) -> Answered:
        self.asked += 1
        replies = {}
        for edge_type, request in requests.items():
            owners = torch.searchsorted(self.offsets(edge_type[2]), request.ids, right=True) - 1
            index = [(owners == p).nonzero().flatten() for p in range(self.num_parts)]
            asked = [HopRequest.from_wire(*request.take(at).to_wire()) for at in index]
            told = [answer_hop(share, one).to_wire() for share, one in zip(self.shares, asked, strict=True)]
            replies[edge_type] = HopReply.merge(
                [HopReply.from_wire(*one) for one in told], index, request.ids.numel()
            )
        return Answered(replies)

    def ids_of(self, node_type: str, raw_ids: Tensor) -> Tensor:
        return self._ids[node_type][raw_ids]

    def has_node_attr(self, node_type: str, name: str) -> bool:
        return name in self.shares[0].node(node_type)

    def node_rows(self, node_type: str, name: str, ids: Tensor) -> Tensor:
        return torch.cat([share.node(node_type)[name] for share in self.shares])[ids]

    def tell_halo(self, name: str) -> None:
        r"""Sets a node attribute for the sources of all shares, owned nodes and halo."""
        for node_type in self.node_types:
            if self.has_node_attr(node_type, name):
                for share in self.shares:
                    sources = share.node(node_type, "src")
                    sources[name] = self.node_rows(node_type, name, sources["ids"])


def parts_of(data: Data | HeteroData, num_parts: int, folder: Path) -> AllParts:
    r"""A random cut, written and read back."""
    GraphData.from_pyg_data(data).partition_graph(folder, num_parts, algorithm="random")
    return AllParts(
        [
            GraphData.load_partition(folder, part, num_parts, algorithm="random", verify=False)
            for part in range(num_parts)
        ]
    )


def typed_graph(seed: int = 0) -> HeteroData:
    r"""Three node types and five edge types: within a type and between two, there and back, one without edges; with
    duplicate edges, self-loops, weights, and times of edges."""
    draw = torch.Generator().manual_seed(seed)
    data = HeteroData()
    sizes = {"author": 30, "paper": 50, "venue": 4}
    for name, size in sizes.items():
        data[name].x = torch.randn(size, 4, generator=draw, dtype=torch.float64)
        data[name].num_nodes = size
    for edge_type, num_edges in {
        ("author", "writes", "paper"): 120,
        ("paper", "rev_writes", "author"): 100,
        ("paper", "cites", "paper"): 150,
        ("paper", "in", "venue"): 60,
        ("venue", "likes", "author"): 0,
    }.items():
        ends = [torch.randint(sizes[edge_type[i]], (num_edges,), generator=draw) for i in (0, 2)]
        data[edge_type].edge_index = torch.stack(ends)
        data[edge_type].weight = torch.rand(num_edges, generator=draw, dtype=torch.float64)
        data[edge_type].time = torch.randint(100, (num_edges,), generator=draw)
    return data
