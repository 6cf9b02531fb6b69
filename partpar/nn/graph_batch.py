r"""A batch of whole graphs, dealt to workers: a cut that no edge crosses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.graph.collection import GraphCollection
from partpar.route import Route

_checks = exchange.Checks()  # one for all batches: each is a route of its own


@dataclass(frozen=True, eq=False)
class WholeGraphs(Route):
    r"""A route that nothing travels on: it only names the workers."""

    def apply(self, x: Tensor) -> Tensor:
        r"""All sources are owned: :obj:`x` itself."""
        return x


@dataclass(frozen=True)
class GraphBatch:
    r"""One worker's graphs of a batch, as a share without halo: norms and sums over the batch are then those of one
    process.

    Args:
        nodes: ``[num_owned]`` int64, places in the collection.
        edges: ``[E]`` int64, places in the collection.
        edge_index: ``[2, E]`` int64, into :obj:`nodes`.
        batch: ``[num_owned]`` int64, each node's graph, numbered over the whole batch.
        y: ``[batch_size]`` int64, the labels of the whole batch.
        route: Reaches the other workers.
    """

    nodes: Tensor
    edges: Tensor
    edge_index: Tensor
    batch: Tensor
    y: Tensor
    route: Route

    @classmethod
    def deal(cls, graphs: GraphCollection, chosen: Tensor, group: ProcessGroup | None = None) -> GraphBatch:
        r"""Deals a batch: each worker has a run of its graphs, as many as the others but for one.

        Args:
            graphs: All graphs, which every worker has.
            chosen: ``[batch_size]`` int64, the same on every worker.
            group: The workers, such as a context's group; :obj:`None` when alone.
        """
        own = None if group is None else exchange.own_group(group)
        rank, size = exchange.rank_and_size(own)
        first, last = (len(chosen) * part // size for part in (rank, rank + 1))
        mine = chosen[first:last]
        nodes, graph = graphs.nodes_of(mine)
        edges, edge_index = graphs.edges_of(mine)
        none = (0,) * size
        route = WholeGraphs(nodes, len(nodes), 0, torch.empty(0, dtype=torch.int64), none, none, None, own, _checks=_checks)
        return cls(nodes, edges, edge_index, graph + first, graphs.y[chosen], route)
