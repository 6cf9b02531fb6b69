r"""From a graph's attributes to what an algorithm balances: one id space over all node types, one column a constraint."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from partpar.errors import PartitionError
from partpar.graph import EdgeType, GraphData
from partpar.partition.problem import Array, ArrayEdges, JoinedEdges, Problem

# A node type or labelled set of fewer nodes than this is not made a constraint by "NAME:*".
FEWEST = 100


def make_problem(
    graph: GraphData,
    num_parts: int,
    node_weights: list[str],
    edge_weight: str | Mapping[EdgeType, float | str] | None,
    seed: int,
) -> Problem:
    r"""The partitioning problem of a graph; node types stand one behind another.

    Args:
        graph: A whole graph.
        num_parts: Number of parts.
        node_weights: Attributes to balance; ``"#nodes"`` and ``"#in_edges"`` are built in. See :func:`expand` for those
            of one type.
        edge_weight: Edge attribute; or for each edge type a number or an attribute; or :obj:`None`.
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
    weights = _edge_weights(graph, edge_weight)
    sources = [
        ArrayEdges(graph.stream(e), weights.get(e), starts[e[0]], starts[e[2]]) for e in graph.edge_types
    ]
    edges = sources[0] if len(sources) == 1 else JoinedEdges(sources)
    columns = {name: _column(graph, name) for name in expand(graph, node_weights)[0]}
    num_nodes = sum(graph.num_nodes(t) for t in graph.node_types)
    return Problem(num_nodes, edges, num_parts, columns, seed)


def expand(graph: GraphData, node_weights: list[str]) -> tuple[list[str], dict[str, int]]:
    r"""Writes ``"NAME:*"`` as one ``"NAME:TYPE"`` for each node type that has it: a constraint of its own for each.

    What fewer than :data:`FEWEST` nodes carry is left out: METIS is as lenient with all constraints as the least
    divisible one makes it.

    Returns:
        The constraints, and those left out with their number of nodes.
    """
    names: list[str] = []
    left_out: dict[str, int] = {}
    for given in node_weights:
        name, colon, node_type = given.rpartition(":")
        if not (colon and node_type == "*") or _is_attribute(graph, given):
            names.append(given)
            continue
        for t in graph.node_types:
            if name.startswith("#") or name in graph.node(t):
                nodes = graph.num_nodes(t) if name.startswith("#") else int(graph.node(t)[name].count_nonzero())
                if nodes < FEWEST:
                    left_out[f"{name}:{t}"] = nodes
                else:
                    names.append(f"{name}:{t}")
    return list(dict.fromkeys(names)), left_out


def _is_attribute(graph: GraphData, name: str) -> bool:
    return any(name in graph.node(t) for t in graph.node_types)


def _column(graph: GraphData, given: str) -> Array:
    """One number a node, types one behind another; 0 for types that the name leaves out."""
    name, colon, only = given.rpartition(":")
    if not colon or _is_attribute(graph, given):
        name, only = given, ""
    types = [only] if only else graph.node_types
    builtin = name in ("#nodes", "#in_edges")
    if set(types) - set(graph.node_types) or not (builtin or any(name in graph.node(t) for t in types)):
        known = sorted({n for t in graph.node_types for n in graph.node(t)})
        raise PartitionError(
            f"node_weight: expected '#nodes', '#in_edges' or a node attribute ({known}), found {given!r}; of one node "
            f"type ({graph.node_types}) as NAME:TYPE, of each by itself as NAME:*"
        )
    pieces: list[Array] = []
    for node_type in graph.node_types:
        size = graph.num_nodes(node_type)
        if node_type not in types:
            pieces.append(np.zeros(size))
        elif name == "#nodes":
            pieces.append(np.ones(size))
        elif name == "#in_edges":
            into = [graph.edge_index(e)[1].numpy() for e in graph.edge_types if e[2] == node_type]
            pieces.append(
                sum((np.bincount(dst, minlength=size) for dst in into), np.zeros(size, dtype=np.int64))
            )
        elif name in graph.node(node_type):
            weight = graph.node(node_type)[name]
            _check_column(f"node_weight {given!r}", weight)
            pieces.append(weight.flatten().numpy())
        else:
            pieces.append(np.zeros(size))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _edge_weights(
    graph: GraphData, given: str | Mapping[EdgeType, float | str] | None
) -> dict[EdgeType, Array]:
    """``[E]`` for each edge type that has a weight."""
    if given is None:
        return {}
    if isinstance(given, str):
        if not any(given in graph.edge(t) for t in graph.edge_types):
            known = sorted({name for t in graph.edge_types for name in graph.edge(t)})
            raise PartitionError(
                f"edge_weight: expected the name of an edge attribute ({known}), found {given!r}"
            )
        given = {t: given for t in graph.edge_types if given in graph.edge(t)}
    weights: dict[EdgeType, Array] = {}
    for edge_type, weight in given.items():
        if edge_type not in graph.edge_types:
            raise PartitionError(
                f"edge_weight: expected edge types of {graph.edge_types}, found {edge_type}"
            )
        if not isinstance(weight, str):
            weights[edge_type] = np.broadcast_to(np.asarray(weight), graph.num_edges(edge_type))
            continue
        if weight not in graph.edge(edge_type):
            raise PartitionError(
                f"edge_weight: expected an attribute of {edge_type} ({sorted(graph.edge(edge_type))}), found {weight!r}"
            )
        column = graph.edge(edge_type)[weight]
        _check_column(f"edge_weight {weight!r}", column)
        weights[edge_type] = column.flatten().numpy()
    return weights


def _check_column(what: str, weight: Tensor) -> None:
    if weight.numel() != weight.size(0) or weight.dtype.is_complex:
        raise PartitionError(
            f"{what}: expected one number a row, found {weight.dtype} of shape {tuple(weight.shape)}"
        )
