r"""Shares cut by hand, straight from the definition: what partitioned code is compared with, and fed by, in
tests that need no partitioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.data import Data

from partpar import Route


@dataclass
class HandmadeShare:
    r"""One worker's piece of a graph. ``owned`` and ``edges`` are the raw ids of its nodes and edges."""

    data: Data
    owned: Tensor
    edges: Tensor
    edge_index: Tensor
    route: Route

    def node(self, name: str) -> Tensor:
        return self.data[name][self.owned]

    def edge(self, name: str) -> Tensor:
        return self.data[name][self.edges]


def cut(data: Data, assignment: Tensor, rank: int, group: object) -> HandmadeShare:
    r"""The share of ``rank``: its nodes by raw id, their in-edges in raw order, sources owned first and then
    the halo by owner (collective)."""
    source, destination = data.edge_index
    owned = (assignment == rank).nonzero().flatten()
    edges = (assignment[destination] == rank).nonzero().flatten()
    edges = edges[destination[edges].argsort(stable=True)]
    halo = source[edges].unique()
    halo = halo[assignment[halo] != rank]
    halo = halo[assignment[halo].argsort(stable=True)]
    sources = torch.cat([owned, halo])
    row = torch.full((int(data.num_nodes or 0),), -1)
    row[sources] = torch.arange(sources.numel())
    route = Route.from_raw_ids(sources, owned, group)  # type: ignore[arg-type]
    return HandmadeShare(
        data, owned, edges, torch.stack([row[source[edges]], row[destination[edges]]]), route
    )


def assignments(num_nodes: int, world_size: int) -> dict[str, Tensor]:
    r"""Hand-made partitions by name: an even one, one whose first part is empty, and one where one part has
    all."""
    draw = torch.Generator().manual_seed(world_size)
    even = torch.randint(world_size, (num_nodes,), generator=draw)
    empty = torch.randint(1, max(world_size, 2), (num_nodes,), generator=draw) if world_size > 1 else even
    return {"even": even, "empty part": empty, "all in the last": torch.full((num_nodes,), world_size - 1)}
