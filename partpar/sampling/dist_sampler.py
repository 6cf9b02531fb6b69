r"""The sampler by the names of ``torch_geometric.distributed``: from a pair of stores, in raw ids, as coroutines."""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch_geometric.sampler import HeteroSamplerOutput, NegativeSampling, NodeSamplerInput, SamplerOutput

from partpar.errors import SamplingError
from partpar.graph import EdgeType, GraphData
from partpar.sampling.event_loop import ConcurrentEventLoop
from partpar.sampling.neighbor_sampler import NeighborSampler, NumNeighborsType, sampling_options
from partpar.sampling.subgraph import BatchKey, LinkSeeds, Seeds
from partpar.serving.feature_store import LocalFeatureStore
from partpar.serving.graph_store import LocalGraphStore
from partpar.serving.handmade import share_of
from partpar.serving.joined import join_service
from partpar.serving.service import Service
from partpar.serving.start import start_service

Output: TypeAlias = SamplerOutput | HeteroSamplerOutput


class DistNeighborSampler:
    r"""Samples neighbourhoods from the parts that several processes hold.

    Set up by :meth:`register_sampler_rpc` once the processes can call each other; a loader does that by itself.

    Args:
        current_ctx: Who this process is. Means nothing here: the service knows.
        data: A feature store and a graph store, see :func:`~partpar.serving.handmade.share_of`.
        num_neighbors: Neighbours of each node to draw in each hop; -1 for all.
        channel: Where :meth:`sample_from_nodes` puts its results, instead of returning them.
        replace, subgraph_type, disjoint, temporal_strategy, time_attr, weight_attr: See
            :class:`~partpar.sampling.NeighborSampler`.
        concurrency: Coroutines of the event loop that run at a time.
        device: Means nothing here.
        seed: Of all draws.
        timeout: Seconds until a part that does not answer counts as lost.
        **kwargs: Accepted for old scripts, without meaning.
    """

    def __init__(
        self,
        current_ctx: Any = None,
        data: tuple[LocalFeatureStore, LocalGraphStore] | None = None,
        num_neighbors: NumNeighborsType = (-1,),
        channel: Any = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        time_attr: str | None = None,
        concurrency: int = 1,
        device: Any = None,
        weight_attr: str | None = None,
        seed: int = 0,
        timeout: float = 60.0,
        **kwargs: Any,
    ) -> None:
        if data is None or not isinstance(data[0], LocalFeatureStore) or not isinstance(data[1], LocalGraphStore):
            raise SamplingError("data: expected a pair of a LocalFeatureStore and a LocalGraphStore, found something else")
        self.current_ctx, self.channel, self.concurrency, self.device = current_ctx, channel, concurrency, device
        self.feature_store, self.graph_store = data
        self.options = sampling_options(
            num_neighbors, replace, subgraph_type, disjoint, temporal_strategy, time_attr, weight_attr
        )
        self.num_neighbors, self.time_attr, self.seed, self.timeout = num_neighbors, time_attr, seed, timeout
        self.replace, self.temporal_strategy = replace, temporal_strategy
        self.disjoint = disjoint or time_attr is not None
        self.temporal = time_attr is not None
        self.is_hetero = bool(self.graph_store.meta and self.graph_store.meta.get("is_hetero"))
        self.event_loop: ConcurrentEventLoop | None = None
        self.service: Service | None = None
        self._share: GraphData | None = None
        self._engine: NeighborSampler | None = None
        self._batches = itertools.count()

    # --- set-up -----------------------------------------------------------------------------------------------------

    def init_sampler_instance(self) -> None:
        r"""Reads the stores."""
        if self._share is None:
            self._share = share_of(self.feature_store, self.graph_store, self.time_attr)

    def register_sampler_rpc(self) -> None:
        r"""Starts to answer for this part (collective)."""
        self.init_sampler_instance()
        assert self._share is not None
        if self.service is None:
            kept = self.graph_store.service
            if kept is not None and kept.share is self._share and not kept.closed:
                self.service = kept
            elif self._share.num_parts == 1:
                self.service = start_service(self._share, timeout=self.timeout)
            else:
                self.service = join_service(self._share, self.timeout)
            self.feature_store.attach(self.service)
            self.graph_store.attach(self.service)
        self._engine = NeighborSampler(self.service, **self.options)

    def init_event_loop(self) -> None:
        r"""Starts the loop that coroutines run on."""
        if self.event_loop is None:
            self.event_loop = ConcurrentEventLoop(self.concurrency)
            self.event_loop.start_loop()

    @property
    def engine(self) -> NeighborSampler:
        r"""What samples."""
        if self._engine is None:
            raise SamplingError("expected register_sampler_rpc before sampling, found none")
        return self._engine

    @property
    def num_hops(self) -> int:
        return self.engine.num_hops

    @property
    def node_types(self) -> list[str]:
        return list(self.engine.service.node_types)

    @property
    def edge_types(self) -> list[EdgeType]:
        return list(self.engine.service.edge_types)

    @property
    def edge_permutation(self) -> None:
        r"""Edges have their raw ids already."""
        return None

    # --- sampling ---------------------------------------------------------------------------------------------------

    async def node_sample(self, inputs: Any, **kwargs: Any) -> Output:
        r"""Samples from a :class:`~torch_geometric.sampler.NodeSamplerInput` of raw ids; draws of each call are new."""
        return await asyncio.get_running_loop().run_in_executor(None, self._from_nodes, inputs)

    async def edge_sample(
        self,
        inputs: Any,
        sample_fn: Any = None,
        num_nodes: Any = None,
        disjoint: bool | None = None,
        node_time: Any = None,
        neg_sampling: NegativeSampling | None = None,
    ) -> Output:
        r"""Samples from an :class:`~torch_geometric.sampler.EdgeSamplerInput` of raw ids. Whether sub-graphs are disjoint,
        and what time nodes have, the sampler knows itself."""
        return await asyncio.get_running_loop().run_in_executor(None, self._from_edges, inputs, neg_sampling)

    def sample_from_nodes(self, inputs: Any, **kwargs: Any) -> Output | None:
        r"""Samples, and looks up features and labels, which are added to the metadata. With a channel, puts the result
        there."""
        return self._deliver(self._from_nodes(NodeSamplerInput.cast(inputs)), inputs.input_type, **kwargs)

    def sample_from_edges(self, inputs: Any, neg_sampling: Any = None, **kwargs: Any) -> Output | None:
        r"""The same from links."""
        return self._deliver(self._from_edges(inputs, neg_sampling), inputs.input_type, **kwargs)

    def _deliver(self, out: Output, input_type: Any, callback: Any = None, **kwargs: Any) -> Output | None:
        service, typed = self.engine.service, self.is_hetero
        assert isinstance(service, Service)
        rows: dict[str, Any] = {"x": {}, "y": {}}
        for node_type, node in (out.node if typed else {self.node_types[0]: out.node}).items():
            ids = service.ids_of(node_type, node)
            names = [name for name in rows if service.has_node_attr(node_type, name)]
            for name, value in (service.fetch(node_type, names, ids) if names else {}).items():
                rows[name][node_type] = value
        edges = out.edge if typed else {self.edge_types[0]: out.edge}
        rows["edge_attr"] = {
            t: service.edge_rows(t, "edge_attr", service.ids_of(t, ids))
            for t, ids in edges.items()
            if ids is not None and service.has_edge_attr(t, "edge_attr")
        }
        found = [value if typed else next(iter(value.values()), None) for value in rows.values()]
        out.metadata = (*out.metadata, found[0], found[1], found[2])
        if callback is not None:
            callback(out)
        if self.channel is None:
            return out
        self.channel.put(out)
        return None

    def _key(self) -> BatchKey:
        return BatchKey(self.seed, 0, next(self._batches))

    def _from_nodes(self, inputs: Any) -> Output:
        if isinstance(inputs, NodeSamplerInput):
            kind = inputs.input_type if self.is_hetero else self.node_types[0]
            if kind is None:
                raise SamplingError(f"expected an input_type of {self.node_types}, found None")
            given, times = {kind: inputs.node}, {kind: inputs.time}
            metadata: Any = (inputs.input_id, inputs.time, inputs.node.numel())
        else:  # the ends of links
            given, times, metadata = inputs.node_dict, inputs.time_dict or {}, None
        seeds = {kind: self._seeds(kind, raw_ids, times.get(kind)) for kind, raw_ids in given.items()}
        return self.engine.sample_nodes(seeds, self._key()).to_pyg(not self.is_hetero, metadata)

    def _from_edges(self, inputs: Any, neg_sampling: Any) -> Output:
        kind = tuple(inputs.input_type) if inputs.input_type is not None else self.edge_types[0]
        negatives = NegativeSampling.cast(neg_sampling)
        if self.temporal and inputs.time is None:
            if negatives is not None:
                raise SamplingError("expected a time for each link to draw negatives for it, found none")
            return self._from_ends(kind, inputs)
        links = LinkSeeds(
            kind,
            self._seeds(kind[0], inputs.row, None, with_times=False),
            self._seeds(kind[2], inputs.col, None, with_times=False),
            inputs.label,
            None if inputs.time is None else inputs.time.to(torch.int64),
        )
        out = self.engine.sample_edges(links, self._key(), negatives)
        assert out.labels is not None
        return out.to_pyg(not self.is_hetero, out.labels.metadata(inputs.input_id))

    def _from_ends(self, kind: EdgeType, inputs: Any) -> Output:
        """Links without a time: each end is of its own node's."""
        n = inputs.row.numel()
        if kind[0] == kind[2]:
            seeds = {kind[0]: self._seeds(kind[0], torch.cat([inputs.row, inputs.col]), None)}
            index = torch.arange(2 * n).view(2, -1)
        else:
            seeds = {end: self._seeds(end, raw_ids, None) for end, raw_ids in ((kind[0], inputs.row), (kind[2], inputs.col))}
            index = torch.arange(n).repeat(2).view(2, -1)
        out = self.engine.sample_nodes(seeds, self._key())
        assert out.batch is not None
        for node_type, groups in out.batch.items():
            out.batch[node_type] = groups % max(n, 1)
        return out.to_pyg(not self.is_hetero, (inputs.input_id, index, inputs.label, None))

    def _seeds(self, kind: str, raw_ids: Tensor, times: Tensor | None, with_times: bool = True) -> Seeds:
        service, raw_ids = self.engine.service, raw_ids.to(torch.int64).contiguous()
        ids = service.ids_of(kind, raw_ids)
        if not with_times or not self.temporal:
            return Seeds(ids, raw_ids)
        if times is None:
            assert self.time_attr is not None
            if not service.has_node_attr(kind, self.time_attr):
                raise SamplingError(f"expected a time for each seed, since nodes of type {kind!r} have no {self.time_attr!r}")
            times = service.node_rows(kind, self.time_attr, ids)
        return Seeds(ids, raw_ids, times.to(torch.int64))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pid={os.getpid()})"

