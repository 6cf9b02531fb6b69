r"""The whole graph, put together again from all shares of a partition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from partpar.graph import EdgeType, Frame, GraphData
from partpar.partition.load import open_share
from partpar.partition.manifest import Manifest, read_manifest

_OWN = ("raw_ids", "ids")


def assemble(folder: str | Path, verify: bool | None = None) -> GraphData:
    r"""Opens all shares of a partition and undoes the cut: nodes and edges stand by their raw ids.

    Needs the memory of the whole graph.

    Args:
        folder: Of the partition, such as ``root/metis_4``.
        verify: As for :meth:`partpar.GraphData.load_partition`.

    Raises:
        PartitionFileError: If a file is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    return join([open_share(folder, manifest, part, verify) for part in range(manifest.num_parts)], manifest)


def join(shares: Sequence[GraphData], manifest: Manifest) -> GraphData:
    r"""The graph of which these are all shares, in order of their parts."""
    nodes, edges, structure = {}, {}, {}
    raw = {t: torch.cat([share.node(t)["raw_ids"] for share in shares]) for t in manifest.node_offsets}
    for node_type, raw_ids in raw.items():
        nodes[node_type] = _frame([share.node(node_type) for share in shares], raw_ids, f"nodes of type {node_type!r}")
    for edge_type, _ in manifest.edge_types:
        raw_edges = torch.cat([share.edge(edge_type)["raw_ids"] for share in shares])
        edges[edge_type] = _frame([share.edge(edge_type) for share in shares], raw_edges, f"edges of type {edge_type}")
        structure[edge_type] = _edges(shares, edge_type, raw)[:, raw_edges.argsort()]
    return GraphData(nodes, edges, structure, shares[0].meta())


def _frame(frames: Sequence[Frame], raw_ids: Tensor, what: str) -> Frame:
    names = [name for name in frames[0] if name not in _OWN]
    columns = {}
    for name in names:
        pieces = torch.cat([frame[name] for frame in frames])
        columns[name] = torch.empty_like(pieces)
        columns[name][raw_ids] = pieces
    return Frame(raw_ids.numel(), columns, what)


def _edges(shares: Sequence[GraphData], edge_type: EdgeType, raw: Mapping[str, Tensor]) -> Tensor:
    r"""``[2, E]`` raw ids of ends, in the order of the shares."""
    pieces = []
    for share in shares:
        source, destination = share.edge_index(edge_type)
        first = int(share.offsets(edge_type[2])[share.part_id])
        ids = share.node(edge_type[0], "src")["ids"]
        pieces.append(torch.stack([raw[edge_type[0]][ids[source]], raw[edge_type[2]][first + destination]]))
    return torch.cat(pieces, 1)
