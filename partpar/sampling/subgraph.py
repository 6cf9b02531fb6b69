r"""What is sampled from, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.sampler import HeteroSamplerOutput, SamplerOutput

from partpar.graph import EdgeType


@dataclass(frozen=True)
class BatchKey:
    r"""What all draws of a batch depend on; the same key and seeds give the same batch wherever it is sampled."""

    seed: int = 0
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Seeds:
    r"""Nodes of one type to sample from.

    Args:
        ids: ``[n]`` int64, their ids after renumbering.
        raw_ids: ``[n]`` int64, their raw ids.
        times: ``[n]`` int64, the latest time of what is sampled for each.
    """

    ids: Tensor
    raw_ids: Tensor
    times: Tensor | None = None


@dataclass(frozen=True)
class LinkSeeds:
    r"""Links to sample from.

    Args:
        edge_type: Whose ends they join.
        src, dst: The ends, as many of each.
        label: ``[n, *]``, what is known of each link.
        times: ``[n]`` int64, the latest time of what is sampled for each.
    """

    edge_type: EdgeType
    src: Seeds
    dst: Seeds
    label: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class LinkLabels:
    r"""Where the links of a batch stand among its nodes; named as PyG names them.

    Either ``edge_label_index`` int64 ``[2, links]`` and ``edge_label`` (positive links, then negative ones, labelled
    0), or for triplets ``src_index`` and ``dst_pos_index`` int64 ``[n]`` and ``dst_neg_index`` int64 ``[n]`` or
    ``[n, amount]``. ``time`` is that of the links, with :obj:`edge_label_index` of the negative ones too.
    """

    edge_label_index: Tensor | None = None
    edge_label: Tensor | None = None
    src_index: Tensor | None = None
    dst_pos_index: Tensor | None = None
    dst_neg_index: Tensor | None = None
    time: Tensor | None = None

    def metadata(self, input_id: Tensor | None) -> tuple[Any, ...]:
        r"""The tuple that PyG's link loaders read."""
        if self.edge_label_index is not None:
            return input_id, self.edge_label_index, self.edge_label, self.time
        return input_id, self.src_index, self.dst_pos_index, self.dst_neg_index, self.time


@dataclass(frozen=True)
class SampledSubgraph:
    r"""The nodes and edges that were found, in the order of their discovery: seeds first.

    Args:
        ids: For each node type ``[n]`` int64, ids after renumbering.
        raw_ids: Their raw ids, PyG's ``n_id``.
        row, col: For each edge type ``[m]`` int64, positions of source and destination among the nodes of their types.
        edge: For each edge type ``[m]`` int64, raw edge ids, PyG's ``e_id``; :obj:`None` where edges of two types were
            made one.
        edge_rows: For each edge type ``[m]`` int64, edge ids after renumbering, if asked for.
        batch: For each node type ``[n]`` int64, the position of the seed that a node was found for; only of disjoint
            sub-graphs.
        num_sampled_nodes: For each node type, how many each hop found, seeds first.
        num_sampled_edges: For each edge type, how many each hop found. Both are :obj:`None` where edges do not stand hop
            after hop.
        labels: Of a batch of links.
    """

    ids: dict[str, Tensor]
    raw_ids: dict[str, Tensor]
    row: dict[EdgeType, Tensor]
    col: dict[EdgeType, Tensor]
    edge: dict[EdgeType, Tensor | None]
    edge_rows: dict[EdgeType, Tensor | None] | None = None
    batch: dict[str, Tensor] | None = None
    num_sampled_nodes: dict[str, list[int]] | None = None
    num_sampled_edges: dict[EdgeType, list[int]] | None = None
    labels: LinkLabels | None = None

    def to_pyg(self, homogeneous: bool, metadata: Any = None) -> SamplerOutput | HeteroSamplerOutput:
        r"""As PyG's own samplers put it, nodes by raw ids.

        Args:
            homogeneous: Give a :class:`~torch_geometric.sampler.SamplerOutput`; the graph has one node and edge type.
            metadata: What loaders pass on beside.
        """
        if not homogeneous:
            return HeteroSamplerOutput(
                dict(self.raw_ids),
                dict(self.row),
                dict(self.col),
                dict(self.edge),
                None if self.batch is None else dict(self.batch),
                self.num_sampled_nodes,
                self.num_sampled_edges,
                metadata=metadata,
            )
        (node_type,), (edge_type,) = self.ids, self.row
        return SamplerOutput(
            self.raw_ids[node_type],
            self.row[edge_type],
            self.col[edge_type],
            self.edge[edge_type],
            None if self.batch is None else self.batch[node_type],
            None if self.num_sampled_nodes is None else self.num_sampled_nodes[node_type],
            None if self.num_sampled_edges is None else self.num_sampled_edges[edge_type],
            metadata=metadata,
        )


NO_IDS = torch.empty(0, dtype=torch.int64)
