r"""The cut: from a part for every node to the tensors of every share, without a loop over nodes or edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from partpar.graph import EdgeType, GraphData
from partpar.kernels.csr import compress
from partpar.partition.layout import edge_key, node_key

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Cut:
    r"""Where every node and edge goes. Nodes are renumbered so that part p owns a range of ids, in raw order within a
    part; edges are grouped by the new id of their destination, in raw order within a destination.

    Args:
        offsets: ``[num_parts + 1]`` int64 for each node type.
        raw_ids: Raw id of each id, for each node type.
        ids: Id of each raw id.
        indptr: ``[num_nodes + 1]`` int64 over the ids of destinations, for each edge type.
        edge_order: Raw edge id of each edge in its new place.
    """

    num_parts: int
    offsets: dict[str, Tensor]
    raw_ids: dict[str, Tensor]
    ids: dict[str, Tensor]
    indptr: dict[EdgeType, Tensor]
    edge_order: dict[EdgeType, Tensor]


@dataclass(frozen=True)
class ShareCounts:
    r"""What the quality report needs to know of one share."""

    owned: dict[str, int]
    halo_from: dict[str, list[int]]
    edges: dict[EdgeType, int]
    cut_edges: dict[EdgeType, int]


def plan_cut(graph: GraphData, assignment: Mapping[str, Tensor], num_parts: int) -> Cut:
    r"""Renumbers nodes and groups edges.

    Args:
        graph: A whole graph.
        assignment: ``[num_nodes]`` integers below :obj:`num_parts` for each node type.
        num_parts: Number of parts.
    """
    offsets, raw_ids, ids, indptr, edge_order = {}, {}, {}, {}, {}
    for node_type in graph.node_types:
        offsets[node_type], raw = compress(assignment[node_type].to(torch.int32), num_parts)
        place = torch.empty_like(raw)
        place[raw.long()] = torch.arange(raw.numel(), dtype=raw.dtype)
        raw_ids[node_type], ids[node_type] = raw, place
    for edge_type in graph.edge_types:
        new_dst = ids[edge_type[2]][graph.edge_index(edge_type)[1]]
        indptr[edge_type], edge_order[edge_type] = compress(new_dst, graph.num_nodes(edge_type[2]))
    return Cut(num_parts, offsets, raw_ids, ids, indptr, edge_order)


def cut_share(graph: GraphData, cut: Cut, part_id: int) -> tuple[dict[str, Tensor], ShareCounts]:
    r"""The tensors of one share, by their names in its file, and its counts."""
    tensors: dict[str, Tensor] = {}
    counts = ShareCounts({}, {}, {}, {})
    ranges = {t: (int(o[part_id]), int(o[part_id + 1])) for t, o in cut.offsets.items()}

    sources: dict[EdgeType, Tensor] = {}
    is_halo = {t: torch.zeros(graph.num_nodes(t), dtype=torch.bool) for t in graph.node_types}
    for edge_type in graph.edge_types:
        low, high = ranges[edge_type[2]]
        indptr = cut.indptr[edge_type][low : high + 1]
        raw_edges = cut.edge_order[edge_type][int(indptr[0]) : int(indptr[-1])].to(torch.int64)
        sources[edge_type] = _source_ids(graph, cut, edge_type, raw_edges, is_halo[edge_type[0]])
        tensors[edge_key(edge_type, "indptr")] = indptr - indptr[0]
        tensors[edge_key(edge_type, "raw_ids")] = raw_edges
        for name, value in graph.edge(edge_type).items():
            tensors[edge_key(edge_type, "attr", name)] = value[raw_edges]
        counts.edges[edge_type] = raw_edges.numel()

    halo_ids: dict[str, Tensor] = {}
    for node_type, (low, high) in ranges.items():
        is_halo[node_type][low:high] = False
        halo = halo_ids[node_type] = is_halo[node_type].nonzero().flatten()
        owned = cut.raw_ids[node_type][low:high].to(torch.int64)
        tensors[node_key(node_type, "raw_ids")] = owned
        tensors[node_key(node_type, "halo_ids")] = halo
        tensors[node_key(node_type, "halo_raw_ids")] = cut.raw_ids[node_type][halo].to(torch.int64)
        for name, value in graph.node(node_type).items():
            tensors[node_key(node_type, "attr", name)] = value[owned]
        owners = torch.searchsorted(cut.offsets[node_type], halo, right=True) - 1
        counts.owned[node_type] = high - low
        counts.halo_from[node_type] = torch.bincount(owners, minlength=cut.num_parts).tolist()

    for edge_type, source in sources.items():
        low, high = ranges[edge_type[0]]
        counts.cut_edges[edge_type] = _localise(source, low, high, halo_ids[edge_type[0]])
        tensors[edge_key(edge_type, "indices")] = source
    return tensors, counts


def _source_ids(graph: GraphData, cut: Cut, edge_type: EdgeType, raw_edges: Tensor, seen: Tensor) -> Tensor:
    """The source ids of some edges; marks them as seen. Goes by chunks, since indexing needs 8 bytes an edge."""
    raw_sources, ids = graph.edge_index(edge_type)[0], cut.ids[edge_type[0]]
    out = torch.empty(raw_edges.numel(), dtype=ids.dtype)
    for chunk, into in zip(raw_edges.split(_CHUNK), out.split(_CHUNK), strict=True):
        torch.index_select(ids, 0, raw_sources[chunk], out=into)
        seen[into.long()] = True
    return out


def _localise(source: Tensor, low: int, high: int, halo: Tensor) -> int:
    """Turns source ids into places among "owned, then halo", in place; returns how many are halo."""
    halo, num_cut = halo.to(source.dtype), 0
    for chunk in source.split(_CHUNK):
        own = (chunk >= low) & (chunk < high)
        place = torch.searchsorted(halo, chunk, out_int32=chunk.dtype == torch.int32) + (high - low)
        chunk.copy_(torch.where(own, chunk - low, place))
        num_cut += int((~own).sum())
    return num_cut
