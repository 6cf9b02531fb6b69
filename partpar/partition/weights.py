r"""From a graph's attributes to what an algorithm balances: one id space over all node types, one column a constraint."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from partpar.errors import PartitionError
from partpar.graph import GraphData
from partpar.partition.problem import Array, ArrayEdges, JoinedEdges, Problem


def make_problem(
    graph: GraphData, num_parts: int, node_weights: list[str], edge_weight: str | None, seed: int
) -> Problem:
    r"""The partitioning problem of a graph; node types stand one behind another.

    Args:
        graph: A whole graph.
        num_parts: Number of parts.
        node_weights: Attributes to balance; ``"#nodes"`` and ``"#in_edges"`` are built in.
        edge_weight: Edge attribute, or :obj:`None`.
        seed: Of the algorithm.

    Raises:
        PartitionError: No node (edge) type has an attribute of that name, or it is not one number a row.
    """
    starts = dict(
        zip(
            graph.node_types,
            np.cumsum([0] + [graph.num_nodes(t) for t in graph.node_types]).tolist(),
            strict=False,
        )
    )
    if edge_weight is not None and not any(edge_weight in graph.edge(t) for t in graph.edge_types):
        known = sorted({name for t in graph.edge_types for name in graph.edge(t)})
        raise PartitionError(
            f"edge_weight: expected the name of an edge attribute ({known}), found {edge_weight!r}"
        )
    sources = []
    for edge_type in graph.edge_types:
        weight = (
            graph.edge(edge_type)[edge_weight]
            if edge_weight is not None and edge_weight in graph.edge(edge_type)
            else None
        )
        if weight is not None:
            _check_column(f"edge_weight {edge_weight!r}", weight)
        numbers = None if weight is None else weight.flatten().numpy()
        sources.append(
            ArrayEdges(graph.stream(edge_type), numbers, starts[edge_type[0]], starts[edge_type[2]])
        )
    edges = sources[0] if len(sources) == 1 else JoinedEdges(sources)
    columns = {name: _column(graph, name) for name in node_weights}
    num_nodes = sum(graph.num_nodes(t) for t in graph.node_types)
    return Problem(num_nodes, edges, num_parts, columns, seed)


def _column(graph: GraphData, name: str) -> Array:
    pieces: list[Array] = []
    for node_type in graph.node_types:
        size = graph.num_nodes(node_type)
        if name == "#nodes":
            pieces.append(np.ones(size))
        elif name == "#in_edges":
            into = [graph.edge_index(e)[1].numpy() for e in graph.edge_types if e[2] == node_type]
            pieces.append(
                sum((np.bincount(dst, minlength=size) for dst in into), np.zeros(size, dtype=np.int64))
            )
        elif name in graph.node(node_type):
            weight = graph.node(node_type)[name]
            _check_column(f"node_weight {name!r}", weight)
            pieces.append(weight.flatten().numpy())
        else:
            pieces.append(np.zeros(size))
    if not name.startswith("#") and not any(name in graph.node(t) for t in graph.node_types):
        known = sorted({n for t in graph.node_types for n in graph.node(t)})
        raise PartitionError(
            f"node_weight: expected '#nodes', '#in_edges' or a node attribute ({known}), found {name!r}"
        )
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _check_column(what: str, weight: Tensor) -> None:
    if weight.numel() != weight.size(0) or weight.dtype.is_complex:
        raise PartitionError(
            f"{what}: expected one number a row, found {weight.dtype} of shape {tuple(weight.shape)}"
        )
