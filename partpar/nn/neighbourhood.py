r"""A share's edges as layers use them: which plans and constants derive from them, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partpar.kernels import heap
from partpar.kernels.adjacency import Adjacency
from partpar.nn.neighbour_sum import Edges, NeighbourSum, plan_sum
from partpar.nn.source_rows import SourceRows
from partpar.route import Route


def kept(adj: Adjacency, route: Route | None, name: Any, build: Callable[[], Any]) -> Any:
    r"""What derives from edges and route, made once and kept with the edges (collective where :obj:`build` is)."""
    key = (name, id(route))
    if key not in adj._kept:
        adj._kept[key] = (route, build())  # the route lives as long as its id is a key
        heap.give_back()  # a plan takes several times its size to make
    return adj._kept[key][1]


def edge_index_of(adj: Adjacency) -> Tensor:
    r"""``[2, E]`` int64 in the adjacency's order. Not kept."""
    return torch.stack([adj.indices.to(torch.int64), adj.destinations.to(torch.int64)])


def sum_neighbours(
    adj: Adjacency,
    x: Tensor | SourceRows | tuple[Tensor, Tensor],
    route: Route | None,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Sums the rows of in-neighbours (collective; for constant rows at the first call only).

    Args:
        adj: A share's edges.
        x: ``[num_owned, C]``, constant or not; or the rows of a sampled block's sources and destinations.
        route: The share's route.
        weight: ``[E]``, constant.

    Returns:
        ``[num_owned, C]``, a tensor of the caller's own, unless :obj:`x` is constant.
    """
    if isinstance(x, tuple):
        return Edges(adj, weight).sum(x[0])
    if isinstance(x, SourceRows):
        return x.keep((_name(weight), id(adj)), lambda: sum_neighbours(adj, x.owned, route, weight))
    plan = sum_of(adj, route, weight)
    return plan.sum(x) if isinstance(plan, Edges) else plan(x)


def sum_of(adj: Adjacency, route: Route | None, weight: Tensor | None = None) -> Edges | NeighbourSum:
    r"""How the rows of in-neighbours are summed, planned once (collective)."""

    def build() -> tuple[Tensor | None, Edges | NeighbourSum]:
        if route is None or route.group is None:
            return weight, Edges(adj, weight)
        return weight, plan_sum(adj, route, weight)

    plan: Edges | NeighbourSum = kept(adj, route, _name(weight), build)[1]
    return plan


def _name(weight: Tensor | None) -> tuple[str, Any]:
    """A weight is kept with what is called after it, so that its id stays its own."""
    return "sum", None if weight is None else (id(weight), weight._version)


@dataclass(frozen=True, eq=False)
class LoopedEdges:
    r"""Edges with one self-loop for each owned node, as attention and graph convolution want them.

    Args:
        adj: The edges; a self-loop comes from source ``i`` to destination ``i``, as owned rows come first.
        stays: Which of the edges given are no self-loops; these come first in the order that ``adj.edge_ids`` refers
            to, the new loops follow.
    """

    adj: Adjacency
    stays: Tensor

    def per_edge(self, values: Tensor, of_loops: Tensor) -> Tensor:
        r"""Values of the edges given and of the new loops, in the order of :obj:`adj`."""
        assert self.adj.edge_ids is not None
        return torch.cat([values[self.stays], of_loops])[self.adj.edge_ids]


def with_self_loops(adj: Adjacency) -> LoopedEdges:
    r"""Replaces the self-loops that are there by one for each owned node."""

    def build() -> LoopedEdges:
        edge_index = edge_index_of(adj)
        stays = edge_index[0] != edge_index[1]
        loops = torch.arange(adj.num_dst, device=adj.device).expand(2, -1)
        joined = torch.cat([edge_index[:, stays], loops], 1)
        return LoopedEdges(Adjacency.from_edge_index(joined, adj.num_src, adj.num_dst), stays)

    looped: LoopedEdges = kept(adj, None, "self-loops", build)
    return looped
