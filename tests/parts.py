r"""All parts of a partition in one process, behind the service of the first."""

from __future__ import annotations

from pathlib import Path

import torch
from torch_geometric.data import Data, HeteroData

from partpar import GraphData
from partpar.serving import Service
from partpar.serving.cache import RowCache
from partpar.serving.owner import Owner
from partpar.serving.transport import InProcessTransport


def shares_of(data: Data | HeteroData, num_parts: int, folder: Path) -> list[GraphData]:
    r"""A random cut, written and read back."""
    GraphData.from_pyg_data(data).partition_graph(folder, num_parts, algorithm="random")
    return [
        GraphData.load_partition(folder, part, num_parts, algorithm="random", verify=False)
        for part in range(num_parts)
    ]


def parts_of(data: Data | HeteroData, num_parts: int, folder: Path) -> Service:
    r"""Asks all parts of a random cut."""
    return serve(shares_of(data, num_parts, folder))


def serve(shares: list[GraphData]) -> Service:
    r"""The service of the first of all shares of a graph."""
    owners = [Owner(share, RowCache(share, 0)) for share in shares]
    transport = InProcessTransport({part: owner.verbs for part, owner in enumerate(owners)})
    services = [Service(owner, transport) for owner in owners]  # each tells its part how to ask the others
    return services[0]


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
