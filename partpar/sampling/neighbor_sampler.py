r"""Multi-hop neighbour sampling over parts, one question to each part and hop (Hamilton et al., "Inductive
representation learning on large graphs", NeurIPS 2017)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as replaced
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch_geometric.sampler import NegativeSampling
from torch_geometric.sampler.base import NumNeighbors, SubgraphType

from partpar.errors import SamplingError
from partpar.graph import EdgeType
from partpar.kernels import counter
from partpar.sampling.bidirectional import to_bidirectional
from partpar.sampling.found import FoundNodes
from partpar.sampling.links import sample_links
from partpar.sampling.subgraph import NO_IDS, BatchKey, LinkSeeds, SampledSubgraph, Seeds
from partpar.serving.buffers import Buffers
from partpar.serving.messages import STRATEGIES, HopReply, HopRequest
from partpar.serving.protocol import SamplingService

NumNeighborsType: TypeAlias = NumNeighbors | Sequence[int] | Mapping[EdgeType, Sequence[int]]


def sampling_options(
    num_neighbors: NumNeighborsType,
    replace: bool,
    subgraph_type: Any,
    disjoint: bool,
    temporal_strategy: str,
    time_attr: str | None,
    weight_attr: str | None,
) -> dict[str, Any]:
    r"""Arguments of a :class:`NeighborSampler` as plain data, which may be sent to another process."""
    return {
        "num_neighbors": num_neighbors,
        "replace": replace,
        "subgraph_type": SubgraphType(subgraph_type).value,
        "disjoint": disjoint,
        "temporal_strategy": temporal_strategy,
        "time_attr": time_attr,
        "weight_attr": weight_attr,
    }


class NeighborSampler:
    r"""Samples in-neighbourhoods hop by hop, each hop in all edge types at once.

    A homogeneous graph is one with one node and edge type. The order of nodes and edges is that of PyG's sampler, and
    with all neighbours (-1) so are nodes and edges. A batch is a function of its :class:`BatchKey` and its seeds, never
    of parts, workers or threads. It has no state: any number of threads may sample at a time.

    Args:
        service: Answers hops; see :class:`~partpar.serving.protocol.SamplingService`.
        num_neighbors: Neighbours of each node to draw in each hop, -1 for all; a list for all edge types alike, or a
            list for each of them.
        replace: Draw with replacement.
        disjoint: Sample a sub-graph for each seed by itself; always so with :obj:`time_attr`.
        subgraph_type: ``"directional"``: the edges that were drawn; ``"bidirectional"``: those in both directions;
            ``"induced"``: all edges between the nodes that were found.
        weight_attr: Edge attribute that chances are proportional to; what weighs nothing is drawn only by -1.
        time_attr: Node attribute or edge attribute. No neighbour, or no edge, is later than the seed it is drawn for.
        temporal_strategy: ``"uniform"``, or ``"last"``: the latest.
        with_edge_rows: Say for every edge where its attributes stand.

    Raises:
        SamplingError: Arguments that do not fit each other or the graph.
    """

    def __init__(
        self,
        service: SamplingService,
        num_neighbors: NumNeighborsType,
        replace: bool = False,
        disjoint: bool = False,
        subgraph_type: SubgraphType | str = "directional",
        weight_attr: str | None = None,
        time_attr: str | None = None,
        temporal_strategy: str = "uniform",
        with_edge_rows: bool = False,
    ) -> None:
        if temporal_strategy not in STRATEGIES:
            raise SamplingError(f"expected a temporal strategy of {STRATEGIES}, found {temporal_strategy!r}")
        self.service = service
        self.edge_types: list[EdgeType] = list(service.edge_types)
        self.num_neighbors = _fanouts(num_neighbors, self.edge_types)
        self.num_hops = max((len(fanouts) for fanouts in self.num_neighbors.values()), default=0)
        self.replace, self.weight_attr = replace, weight_attr
        self.time_attr, self.temporal_strategy = time_attr, temporal_strategy
        self.disjoint = disjoint or time_attr is not None
        self.subgraph_type = SubgraphType(subgraph_type)
        self.with_edge_rows = with_edge_rows
        self._num_nodes = {t: int(service.offsets(t)[-1]) for t in service.node_types}
        self._tree_size = 1
        for hop in reversed(range(self.num_hops)):
            widest = max(fanouts[hop] if fanouts[hop] >= 0 else 16 for fanouts in self.num_neighbors.values())
            self._tree_size = min(1 + widest * self._tree_size, 1 << 20)
        self._buffers = Buffers()
        self._words = {t: _word("__".join(t)) for t in self.edge_types}

    def sample_nodes(self, seeds: Mapping[str, Seeds], key: BatchKey) -> SampledSubgraph:
        r"""Samples from nodes.

        Args:
            seeds: For each node type that has any; times are needed with :obj:`time_attr`. They come first among the
                nodes, in the order given; with :obj:`disjoint`, trees are numbered through the types in their order.
            key: Names the batch.
        """
        self._check(seeds)
        found, groups = self._start(seeds)
        edges: dict[EdgeType, list[tuple[Tensor, ...]]] = {t: [] for t in self.edge_types}
        num_edges: dict[EdgeType, list[int]] = {t: [] for t in self.edge_types}
        batch_key = counter.key(key.seed, key.epoch, key.batch)
        for hop in range(self.num_hops):
            requests = {}
            for edge_type in self.edge_types:
                rows, fanout = found[edge_type[2]], self.num_neighbors[edge_type][hop]
                if rows.frontier[0].numel() and fanout:
                    requests[edge_type] = self._request(
                        edge_type, *rows.frontier, groups, fanout, batch_key, hop
                    )
            replies = self.service.hop_begin(requests).wait() if requests else {}
            for edge_type in self.edge_types:  # in this order, which decides who is discovered first
                if edge_type not in replies:
                    num_edges[edge_type].append(0)
                    continue
                reply, rows = replies[edge_type], found[edge_type[2]]
                row, col = found[edge_type[0]].add(reply, rows.first, rows.frontier[1])
                edges[edge_type].append((row, col, *_edge_columns(reply)))
                num_edges[edge_type].append(row.numel())
            for nodes in found.values():
                nodes.advance()
        if self.subgraph_type == SubgraphType.induced:
            edges = self._induced(found, groups, batch_key)
        return self._finish(found, edges, num_edges)

    def sample_edges(
        self,
        seeds: LinkSeeds,
        key: BatchKey,
        neg_sampling: NegativeSampling | None = None,
        strict_negatives: bool = False,
    ) -> SampledSubgraph:
        r"""Samples from the ends of links, and of negative links.

        Args:
            seeds: The positive links.
            key: Names the batch.
            neg_sampling: How many negative links to draw and how; see
                :class:`~torch_geometric.sampler.NegativeSampling`.
            strict_negatives: Never draw a link of the batch, or one that is an edge of this type in the graph.
        """
        return sample_links(self, seeds, key, neg_sampling, strict_negatives)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _check(self, seeds: Mapping[str, Seeds]) -> None:
        for node_type, some in seeds.items():
            if node_type not in self._num_nodes:
                raise SamplingError(
                    f"seeds: expected node types of {list(self._num_nodes)}, found {node_type!r}"
                )
            columns = {"ids": some.ids, "raw_ids": some.raw_ids}
            if self.time_attr is not None:
                if some.times is None:
                    raise SamplingError(
                        f"seeds of type {node_type!r}: expected a time for each, since {self.time_attr!r} restricts "
                        f"what is sampled; give input_time, or edge_label_time for links"
                    )
                columns["times"] = some.times
            for name, column in columns.items():
                if column.dtype != torch.int64 or column.shape != some.ids.shape or column.dim() != 1:
                    raise SamplingError(
                        f"{name} of seeds of type {node_type!r}: expected int64 of shape [{some.ids.numel()}], found "
                        f"{column.dtype} of shape {tuple(column.shape)}"
                    )
            high = self._num_nodes[node_type]
            if some.ids.numel() and not 0 <= int(some.ids.min()) <= int(some.ids.max()) < high:
                wrong = some.ids[(some.ids < 0) | (some.ids >= high)]
                raise SamplingError(
                    f"seeds of type {node_type!r}: expected ids from 0 to {high - 1}, found {int(wrong[0])}"
                )

    def _start(self, seeds: Mapping[str, Seeds]) -> tuple[dict[str, FoundNodes], Seeds]:
        r"""The seeds as the first nodes found, and the seed of each group."""
        total = sum(some.ids.numel() for some in seeds.values())
        if self.disjoint and total * max(self._num_nodes.values(), default=0) >= 2**62:
            raise SamplingError(f"expected fewer disjoint seeds in a batch, found {total}")
        found = {}
        first = 0
        for node_type, num_nodes in self._num_nodes.items():
            # Room for the trees of the seeds, so that tables rarely grow.
            expected = min(
                self._tree_size * seeds[node_type].ids.numel() if node_type in seeds else 0, 1 << 20
            )
            found[node_type] = FoundNodes(num_nodes, self.disjoint, expected, self._buffers)
        for node_type, some in seeds.items():
            n = some.ids.numel()
            groups = torch.arange(first, first + n) if self.disjoint else NO_IDS
            found[node_type].add_seeds(some.ids, some.raw_ids, groups)
            first += n
        for nodes in found.values():
            nodes.advance()
        raw_ids = [some.raw_ids for some in seeds.values()]
        times = [some.times for some in seeds.values() if some.times is not None]
        of_groups = Seeds(
            NO_IDS,
            torch.cat(raw_ids) if raw_ids else NO_IDS,
            torch.cat(times) if self.time_attr is not None and times else None,
        )
        return found, of_groups

    def _request(
        self, edge_type: EdgeType, ids: Tensor, groups: Tensor, seeds: Seeds, fanout: int, key: int, hop: int
    ) -> HopRequest:
        return HopRequest(
            edge_type,
            ids,
            fanout,
            counter.key(key, hop, self._words[edge_type]),
            self.replace,
            self.weight_attr,
            self.time_attr,
            self.temporal_strategy,
            None if seeds.times is None else seeds.times[groups],
            seeds.raw_ids[groups] if self.disjoint else None,
            self.with_edge_rows,
        )

    def _induced(
        self, found: dict[str, FoundNodes], seeds: Seeds, key: int
    ) -> dict[EdgeType, list[tuple[Tensor, ...]]]:
        r"""All edges between the nodes found, not later than their seed."""
        requests = {
            t: self._request(t, found[t[2]].ids(), found[t[2]].groups(), seeds, -1, key, self.num_hops)
            for t in self.edge_types
            if found[t[0]].size and found[t[2]].size
        }
        replies = self.service.hop_begin(requests).wait() if requests else {}
        edges: dict[EdgeType, list[tuple[Tensor, ...]]] = {t: [] for t in self.edge_types}
        for edge_type, reply in replies.items():
            row, col, at = found[edge_type[0]].find(reply, found[edge_type[2]].groups())
            edges[edge_type].append((row, col, *(column[at] for column in _edge_columns(reply))))
        return edges

    def _finish(
        self,
        found: dict[str, FoundNodes],
        edges: dict[EdgeType, list[tuple[Tensor, ...]]],
        num_edges: dict[EdgeType, list[int]],
    ) -> SampledSubgraph:
        width = 4 if self.with_edge_rows else 3
        columns = {
            t: [torch.cat(c) for c in zip(*pieces, strict=True)] if pieces else [NO_IDS] * width
            for t, pieces in edges.items()
        }
        out = SampledSubgraph(
            {t: nodes.ids() for t, nodes in found.items()},
            {t: nodes.raw_ids() for t, nodes in found.items()},
            {t: c[0] for t, c in columns.items()},
            {t: c[1] for t, c in columns.items()},
            {t: c[2] for t, c in columns.items()},
            {t: c[3] for t, c in columns.items()} if self.with_edge_rows else None,
            {t: nodes.groups() for t, nodes in found.items()} if self.disjoint else None,
            {t: nodes.counts for t, nodes in found.items()},
            num_edges,
        )
        if self.subgraph_type == SubgraphType.induced:
            return replaced(out, num_sampled_nodes=None, num_sampled_edges=None)
        return to_bidirectional(out) if self.subgraph_type == SubgraphType.bidirectional else out


def _edge_columns(reply: HopReply) -> tuple[Tensor, ...]:
    return (reply.edge_ids,) if reply.edge_rows is None else (reply.edge_ids, reply.edge_rows)


def _fanouts(num_neighbors: Any, edge_types: list[EdgeType]) -> dict[EdgeType, list[int]]:
    given = num_neighbors.values if isinstance(num_neighbors, NumNeighbors) else num_neighbors
    for fanout in given.values() if isinstance(given, Mapping) else [given]:
        if isinstance(fanout, str) or not isinstance(fanout, Iterable):
            raise SamplingError(f"num_neighbors: expected a list with a number for each hop, such as [10, 5], found {fanout!r}")
    if isinstance(num_neighbors, NumNeighbors):
        num_neighbors = NumNeighbors(
            num_neighbors.values, num_neighbors.default
        )  # it remembers other edge types
    else:
        num_neighbors = NumNeighbors(
            dict(num_neighbors) if isinstance(num_neighbors, Mapping) else list(num_neighbors)
        )
    try:
        fanouts = num_neighbors.get_values(edge_types)
    except ValueError as error:
        raise SamplingError(f"num_neighbors: {error}; expected a list for each of {edge_types}") from error
    for edge_type, hops in fanouts.items():
        if not all(isinstance(n, int) and n >= -1 for n in hops):
            raise SamplingError(
                f"num_neighbors of {edge_type}: expected integers of at least -1, found {hops}"
            )
    return {t: list(hops) for t, hops in fanouts.items()}


def _word(name: str) -> int:
    r"""64 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
