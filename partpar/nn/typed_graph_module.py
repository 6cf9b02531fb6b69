r"""Models made by :func:`torch_geometric.nn.to_hetero`: one exchange before the convolutions of each layer."""

from __future__ import annotations

import operator
from contextvars import ContextVar
from typing import Any

import torch_geometric.nn as pyg_nn
from torch.fx import GraphModule, Node
from torch_geometric.nn.to_hetero_transformer import key2str

from partpar.errors import RouteError
from partpar.hetero_route import HeteroRoute
from partpar.nn.hetero_rows import sources
from partpar.nn.rows import owned


def fetch_by_layer(model: GraphModule, route: ContextVar[Any]) -> None:
    r"""Edits the graph of calls, in place: what is given to the convolutions ``layer.<relation>`` of one layer passes
    through one exchange of all types first.

    Args:
        model: Made by ``to_hetero``.
        route: Where the route is found when the model runs.

    Raises:
        ValueError: A convolution is called without rows as its first argument.
    """

    def fetch(inputs: dict[str, Any]) -> dict[str, Any]:
        return _fetch(inputs, route.get())

    graph = model.graph
    for layer in _layers(model):
        first = layer[0]
        earlier = set()
        for node in graph.nodes:
            if node is first:
                break
            earlier.add(node)
        together = [node for node in layer if earlier.issuperset(_nodes_in(node.args[0]))]
        for batch in [together, *([node] for node in layer if node not in together)]:
            inputs = {_relation(node): node.args[0] for node in batch}
            with graph.inserting_before(batch[0]):
                fetched = graph.call_function(fetch, (inputs,))
                rows = {name: graph.call_function(operator.getitem, (fetched, name)) for name in inputs}
            for node in batch:
                node.args = (rows[_relation(node)], *node.args[1:])
    graph.lint()
    model.recompile()


def type_called(name: str, route: HeteroRoute) -> str:
    r"""The node type that ``to_hetero`` spells so."""
    for node_type in route:
        if key2str(node_type) == name:
            return node_type
    raise RouteError(f"expected a node type of {list(route)}, found {name!r} in the model's names")


def _layers(model: GraphModule) -> list[list[Node]]:
    """The calls of convolutions, those of one layer together."""
    members = dict(model.named_modules())
    layers: list[list[Node]] = []
    open_layers: dict[str, list[Node]] = {}
    for node in model.graph.nodes:
        if node.op != "call_module" or not isinstance(members[node.target], pyg_nn.MessagePassing):
            continue
        if not node.args:
            raise ValueError(
                f"route_model: expected convolutions to be called as conv(x, edge_index), found {node.target} called by names only"
            )
        name = node.target.rpartition(".")[0]
        same = open_layers.get(name)
        if same is None or _relation(node) in map(_relation, same):  # a layer that is used again
            same = open_layers[name] = []
            layers.append(same)
        same.append(node)
    return layers


def _relation(node: Node) -> str:
    return str(node.target).rpartition(".")[2]


def _nodes_in(arg: Any) -> list[Node]:
    return [node for node in (arg if isinstance(arg, tuple | list) else (arg,)) if isinstance(node, Node)]


def _fetch(inputs: dict[str, Any], route: HeteroRoute | None) -> dict[str, Any]:
    """``{relation: (sources, owned)}`` from what ``to_hetero`` gives: a pair, or rows where both ends are of one type."""
    if route is None:
        return inputs
    if not isinstance(route, HeteroRoute):
        raise RouteError(f"expected the route of all node types, share.to_route(), found {type(route).__name__}")
    pairs = {name: x if isinstance(x, tuple | list) else (x, x) for name, x in inputs.items()}
    waiting, out = {name: _source_type(name, route) for name in pairs}, {}
    while waiting:  # once, unless the relations of a type read different rows of it
        rows: dict[str, Any] = {}
        for name, node_type in waiting.items():
            rows.setdefault(node_type, pairs[name][0])
        ready = [name for name, node_type in waiting.items() if rows[node_type] is pairs[name][0]]
        fetched = sources(rows, route, rows)
        for name in ready:
            out[name] = (fetched[waiting.pop(name)], owned(pairs[name][1]))
    return out


def _source_type(relation: str, route: HeteroRoute) -> str:
    for edge_type in route.relations:
        if key2str(edge_type) == relation:
            return edge_type[0]
    fitting = [t for t in route if relation.startswith(key2str(t) + "__")]
    if not fitting:
        raise RouteError(f"expected a relation between node types of {list(route)}, found {relation!r}")
    return max(fitting, key=len)
