r"""One batch, from its seeds to PyG's data classes: sample, fetch the rows of what was found, put them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.sampler import NegativeSampling

from partpar.graph import EdgeType
from partpar.sampling.neighbor_sampler import NeighborSampler
from partpar.sampling.subgraph import BatchKey, LinkSeeds, SampledSubgraph, Seeds
from partpar.serving.protocol import SamplingService

Kind: TypeAlias = str | EdgeType
Batch: TypeAlias = Data | HeteroData


class Fetching(Protocol):
    r"""Rows that were asked for."""

    def wait(self) -> Mapping[Kind, Mapping[str, Tensor]]: ...


class BatchService(SamplingService, Protocol):
    r"""What a loader asks of a service: hops, and rows of attributes."""

    def fetch_all_begin(self, wanted: Mapping[Kind, tuple[Any, Tensor]]) -> Fetching:
        r"""Rows of attributes for several types, as ``{type: (names, ids)}``."""
        ...


@dataclass(frozen=True)
class Task:
    r"""Which batch to make: its place in the run, and which of the inputs are its seeds."""

    epoch: int
    number: int
    positions: Tensor


@dataclass(frozen=True)
class Recipe:
    r"""All that a batch depends on beside the graph; plain data, so that it may be sent to another process.

    Args:
        homogeneous: Yield :class:`~torch_geometric.data.Data`.
        seed: Of all draws.
        options: Arguments of the :class:`NeighborSampler`.
        names: For each node and edge type the attributes to bring.
        kind: The type of the inputs: a node type, or for links an edge type.
        columns: The inputs: ``input_id``, ``ids`` and ``raw_ids`` of nodes, or ``src_ids``, ``src_raw_ids``, ``dst_ids``
            and ``dst_raw_ids`` of links; where there are any, ``times`` and ``labels``.
        negatives: Negative links to draw.
        strict: Never draw a negative link that is an edge.
    """

    homogeneous: bool
    seed: int
    options: dict[str, Any]
    names: dict[Kind, list[str]]
    kind: Kind
    columns: dict[str, Tensor]
    negatives: NegativeSampling | None = None
    strict: bool = False


class BatchMaker:
    r"""Makes batches. It has no state: any number of threads may make batches at a time, and the same task gives the same
    batch in any of them, or in another process.

    Args:
        service: Answers hops and brings rows.
        recipe: What to make.
    """

    def __init__(self, service: BatchService, recipe: Recipe) -> None:
        self.service, self.recipe = service, recipe
        # Which row of the attributes belongs to an edge need only be told where there are any.
        with_edge_rows = any(names for kind, names in recipe.names.items() if not isinstance(kind, str))
        self.sampler = NeighborSampler(service, **recipe.options, with_edge_rows=with_edge_rows)

    def __call__(self, task: Task) -> Batch:
        r"""Samples, fetches and joins."""
        out = self.sample(task)
        return self.join(task, out, self.fetch(out))

    def sample(self, task: Task) -> SampledSubgraph:
        r"""The sub-graph of a batch, without attributes."""
        recipe, key = self.recipe, BatchKey(self.recipe.seed, task.epoch, task.number)
        columns = {name: column[task.positions] for name, column in recipe.columns.items()}
        times = columns.get("times")
        if isinstance(recipe.kind, str):
            return self.sampler.sample_nodes({recipe.kind: Seeds(columns["ids"], columns["raw_ids"], times)}, key)
        ends = [Seeds(columns[f"{end}_ids"], columns[f"{end}_raw_ids"]) for end in ("src", "dst")]
        links = LinkSeeds(recipe.kind, ends[0], ends[1], columns.get("labels"), times)
        return self.sampler.sample_edges(links, key, recipe.negatives, recipe.strict)

    def fetch(self, out: SampledSubgraph) -> Mapping[Kind, Mapping[str, Tensor]]:
        r"""The attributes of its nodes and edges, with one question to each part."""
        wanted: dict[Kind, tuple[list[str], Tensor]] = {}
        for kind, names in self.recipe.names.items():
            if isinstance(kind, str):
                ids: Tensor | None = out.ids[kind]
            else:
                ids = None if out.edge_rows is None else out.edge_rows[kind]
            if names and ids is not None:
                wanted[kind] = (names, ids)
        return self.service.fetch_all_begin(wanted).wait() if wanted else {}

    def join(self, task: Task, out: SampledSubgraph, rows: Mapping[Kind, Mapping[str, Tensor]]) -> Batch:
        r"""As PyG's loaders give it."""
        data = self._homogeneous(out, rows) if self.recipe.homogeneous else _heterogeneous(out, rows)
        input_id = self.recipe.columns["input_id"][task.positions]
        at: Any = data if self.recipe.homogeneous else data[self.recipe.kind]
        at.input_id = input_id
        if out.labels is None:
            times = self.recipe.columns.get("times")
            at.seed_time = None if times is None else times[task.positions]
            at.batch_size = input_id.numel()
        else:
            self._label(data, at, out)
        return data

    def _homogeneous(self, out: SampledSubgraph, rows: Mapping[Kind, Mapping[str, Tensor]]) -> Data:
        (node_type,), (edge_type,) = out.ids, out.row
        data = Data(edge_index=torch.stack([out.row[edge_type], out.col[edge_type]]))
        data.num_nodes = out.ids[node_type].numel()
        for kind in (node_type, edge_type):
            for name, values in rows.get(kind, {}).items():
                data[name if name not in data else f"edge_{name}"] = values
        data.n_id = out.raw_ids[node_type]
        if out.edge[edge_type] is not None:
            data.e_id = out.edge[edge_type]
        data.batch = None if out.batch is None else out.batch[node_type]
        data.num_sampled_nodes = None if out.num_sampled_nodes is None else out.num_sampled_nodes[node_type]
        data.num_sampled_edges = None if out.num_sampled_edges is None else out.num_sampled_edges[edge_type]
        return data

    def _label(self, data: Batch, at: Any, out: SampledSubgraph) -> None:
        labels, kind = out.labels, self.recipe.kind
        assert labels is not None
        if labels.edge_label_index is not None:
            at.edge_label_index = labels.edge_label_index
            at.edge_label, at.edge_label_time = labels.edge_label, labels.time
            return
        src: Any = data if self.recipe.homogeneous else data[kind[0]]
        dst: Any = data if self.recipe.homogeneous else data[kind[2]]
        src.src_index, dst.dst_pos_index, dst.dst_neg_index = labels.src_index, labels.dst_pos_index, labels.dst_neg_index
        src.seed_time = dst.seed_time = labels.time


def _heterogeneous(out: SampledSubgraph, rows: Mapping[Kind, Mapping[str, Tensor]]) -> HeteroData:
    data = HeteroData()
    for node_type, ids in out.ids.items():
        store = data[node_type]
        store.num_nodes = ids.numel()
        for name, values in rows.get(node_type, {}).items():
            store[name] = values
        store.n_id = out.raw_ids[node_type]
        if out.batch is not None:
            store.batch = out.batch[node_type]
        if out.num_sampled_nodes is not None:
            store.num_sampled_nodes = out.num_sampled_nodes[node_type]
    for edge_type in out.row:
        store = data[edge_type]
        store.edge_index = torch.stack([out.row[edge_type], out.col[edge_type]])
        for name, values in rows.get(edge_type, {}).items():
            store[name] = values
        if out.edge[edge_type] is not None:
            store.e_id = out.edge[edge_type]
        if out.num_sampled_edges is not None:
            store.num_sampled_edges = out.num_sampled_edges[edge_type]
    return data
