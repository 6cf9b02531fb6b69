r"""Shares of some of a share's edges: the same owned nodes, and only the halo that these edges need."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.graph.data import GraphData
from partpar.graph.frame import Frame
from partpar.graph.structure import CSC, EdgeType


def edge_type_subgraph(graph: GraphData, edge_types: list[EdgeType]) -> GraphData:
    """See :meth:`GraphData.edge_type_subgraph`."""
    unknown = [edge_type for edge_type in edge_types if tuple(edge_type) not in graph.edge_types]
    if unknown or not edge_types:
        raise GraphError(
            f"edge_type_subgraph: expected edge types of {graph.edge_types}, found {unknown[0] if unknown else 'none'}"
        )
    return select_edges(graph, {edge_type: None for edge_type in graph.edge_types if edge_type in edge_types})


def select_edges(graph: GraphData, kept: Mapping[EdgeType, Tensor | None]) -> GraphData:
    r"""The graph of some edges.

    Args:
        graph: A share, or a whole graph.
        kept: The edge types to keep, and for each ``[E]`` bool or :obj:`None` for all edges of it.

    Returns:
        All nodes of :obj:`graph`, with those edges; a share's halo is what they need, in the order it had.
    """
    structure: dict[EdgeType, Tensor | CSC] = {}
    edges: dict[EdgeType, Frame] = {}
    for edge_type, mask in kept.items():
        piece, frame = graph._structure[edge_type], graph.edge(edge_type)
        structure[edge_type] = piece if mask is None else _thin(piece, mask)
        edges[edge_type] = frame if mask is None else _rows_of(frame, mask.nonzero().flatten())

    sources = None
    if graph._sources is not graph._nodes:
        sources = dict(graph._sources)
        for node_type in graph.node_types:
            leaving = [edge_type for edge_type in structure if edge_type[0] == node_type]
            num_owned, frame = graph.num_owned(node_type), graph._sources[node_type]
            needed = torch.zeros(frame.num_rows, dtype=torch.bool, device=graph.device)
            needed[:num_owned] = True
            for edge_type in leaving:
                mark(needed, sources_of(structure[edge_type]))
            if bool(needed.all()):
                continue
            place = needed.cumsum(0) - 1
            sources[node_type] = _rows_of(frame, needed.nonzero().flatten())
            for edge_type in leaving:
                structure[edge_type] = _renumber(structure[edge_type], place)
    return GraphData(graph._nodes, edges, structure, graph.meta(), sources, graph.part)


def mark(mask: Tensor, index: Tensor) -> None:
    r"""``mask[index] = True``, by chunks: torch indexes in 64 bits, which would need more memory than edges take."""
    for chunk in index.split(1 << 20):
        mask[chunk.long()] = True


def sources_of(piece: Tensor | CSC) -> Tensor:
    r"""``[E]``, the source of each edge."""
    return piece.indices if isinstance(piece, CSC) else piece[0]


def _thin(piece: Tensor | CSC, mask: Tensor) -> Tensor | CSC:
    if isinstance(piece, Tensor):
        return piece[:, mask]
    before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    return CSC(before[piece.indptr], piece.indices[mask])


def _renumber(piece: Tensor | CSC, place: Tensor) -> Tensor | CSC:
    if isinstance(piece, Tensor):
        return torch.stack([place[piece[0]], piece[1]])
    return CSC(piece.indptr, place.to(piece.indices.dtype)[piece.indices.long()])


def _rows_of(frame: Frame, rows: Tensor) -> Frame:
    """Some rows of each attribute, taken when it is first read."""
    return Frame(rows.numel(), {name: partial(_take, frame, name, rows) for name in frame}, frame.what)


def _take(frame: Frame, name: str, rows: Tensor) -> Tensor:
    return frame[name][rows]
