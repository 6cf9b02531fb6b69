r"""Convolutions over the relations of a typed graph, one for each, with one exchange for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.nn.conv.hetero_conv import group

from partpar.errors import RouteError
from partpar.graph import EdgeType
from partpar.hetero_route import HeteroRoute
from partpar.kernels.adjacency import Adjacency
from partpar.nn.gcn import GCNConv
from partpar.nn.hetero_rows import adjacency, check_relations, sources
from partpar.nn.matrix import AdjacencyMatrix
from partpar.nn.neighbourhood import edge_index_of
from partpar.nn.routed import check_bipartite
from partpar.nn.rows import owned, takes_route
from partpar.nn.sage import SAGEConv
from partpar.route import Route


class HeteroConv(pyg_nn.HeteroConv):
    r"""A convolution for each edge type, whose results are combined where they meet in a node type; partition-parallel.

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.HeteroConv`. The rows of all source
    types travel in one exchange, and every convolution is then called with the pair ``(sources, owned)``: those of PyG
    that take one, and ours. A :class:`~partpar.nn.GCNConv`, which takes none, does its own exchange.

    .. code-block:: python

        conv = HeteroConv({("author", "writes", "paper"): SAGEConv((16, 32), 64), ...})
        x = conv(x, share.adj_dict(), route=route)

    Raises:
        ValueError: A convolution takes neither a pair nor a route.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F)` and edges :math:`(2, E)` by type
        - **outputs:** :math:`(N_{owned}, F_{out})` for each type that is some edge type's destination
    """

    def __init__(self, convs: Mapping[EdgeType, Any], aggr: str | None = "sum") -> None:
        super().__init__(convs, aggr)
        self.check()

    def check(self) -> None:
        r"""Refuses convolutions that could not be exact on a worker's share."""
        for conv in self.convs.values():
            if not takes_route(conv):
                check_bipartite(conv, type(self).__name__)

    def forward(
        self, *args_dict: Any, route: HeteroRoute | Route | None = None, **kwargs_dict: Any
    ) -> dict[str, Tensor]:
        r"""Runs the convolutions on owned rows (collective).

        Args:
            x_dict: The rows of the owned nodes of each type, or constant rows with their halo.
            edge_index_dict: The share's edges; ``share.adj_dict()`` is the fast way.
            *args_dict (optional): Further arguments of the convolutions by node or edge type.
            route (HeteroRoute, optional): The share's route, by name or as third; :obj:`None` when one process owns
                everything.
            **kwargs_dict (optional): The same by name, as ``edge_attr_dict={edge_type: edge_attr}``.
        """
        unknown = [name for name in kwargs_dict if not name.endswith("_dict")]
        if unknown:
            raise RouteError(f"HeteroConv: expected keywords that end with '_dict', found {unknown[0]!r}")
        names = ("x_dict", "edge_index_dict")
        given = [*args_dict, *(kwargs_dict.pop(name) for name in names[len(args_dict) :])]
        if len(given) > 2 and isinstance(given[2], Route | HeteroRoute):  # where our other layers take it
            route = given.pop(2)
        x, edges, more = given[0], given[1], given[2:]
        used: dict[EdgeType, Any] = {
            e: conv for e, conv in self.convs.items() if e in edges and e[0] in x and e[2] in x
        }
        routes = check_relations(self, x, {e: edges[e] for e in used}, route)
        rows = sources(x, routes, [e[0] for e, conv in used.items() if not isinstance(conv, GCNConv)])
        outs: dict[str, list[Tensor]] = {}
        for edge_type, conv in used.items():
            args = [_of(edge_type, values) for values in more]
            kwargs = {name[:-5]: _of(edge_type, values) for name, values in kwargs_dict.items()}
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            source, _, destination = edge_type
            if isinstance(conv, GCNConv):
                route_of = None if routes is None else routes[source]
                out = conv(x[source], edges[edge_type], route_of, *args, **kwargs)
            else:
                pair = (rows[source], owned(x[destination]))
                out = run(conv, pair, edges[edge_type], args, kwargs)
            outs.setdefault(destination, []).append(out)
        return {t: group(values, self.aggr) for t, values in outs.items()}


def run(
    conv: Any, pair: tuple[Tensor, Tensor], edges: Tensor | Adjacency, args: list[Any], kwargs: dict[str, Any]
) -> Any:
    r"""Calls a convolution with ``(sources, destinations)``, giving it edges in the form that it is fastest with."""
    if takes_route(conv):
        return conv(pair, adjacency(edges, pair[0].size(0), pair[1].size(0)), None, *args, **kwargs)
    if isinstance(edges, Adjacency):
        plain = all(value is None for value in (*args, *kwargs.values()))
        if getattr(conv, "fuse", False) and plain:
            edges = AdjacencyMatrix(edges, pair[0].dtype)
        else:
            edges = edge_index_of(edges)
    return conv(pair, edges, *args, **kwargs)


def _of(edge_type: EdgeType, values: Mapping[Any, Any]) -> Any:
    """What a mapping by edge or node type holds for an edge type."""
    source, _, destination = edge_type
    if edge_type in values:
        return values[edge_type]
    if source in values or destination in values:
        return (values.get(source), values.get(destination))
    return None


class HeteroSAGEConv(HeteroConv):
    r"""GraphSAGE over the relations of a typed graph: a :class:`~partpar.nn.SAGEConv` for each edge type.

    .. math::
        \mathbf{x}^{\prime}_i = \sum_{r} \left( \mathbf{W}_{r,1} \mathbf{x}_i + \mathbf{W}_{r,2} \cdot
        \mathrm{mean}_{j \in \mathcal{N}_r(i)} \mathbf{x}_j \right)

    The ``state_dict`` is that of a :class:`torch_geometric.nn.HeteroConv` of :class:`torch_geometric.nn.SAGEConv`.

    Args:
        in_channels (int or dict): Size of each input row, of all types or by type.
        out_channels (int): Size of each output row.
        edge_types (list): The edge types.
        aggr (str, optional): How relations are combined. (default: :obj:`"sum"`)
        **kwargs (optional): Arguments of :class:`~partpar.nn.SAGEConv`.
    """

    def __init__(
        self,
        in_channels: int | dict[str, int],
        out_channels: int,
        edge_types: list[EdgeType],
        aggr: str | None = "sum",
        **kwargs: Any,
    ) -> None:
        def width(node_type: str) -> int:
            return in_channels if isinstance(in_channels, int) else in_channels[node_type]

        convs = {e: SAGEConv((width(e[0]), width(e[2])), out_channels, **kwargs) for e in edge_types}
        super().__init__(convs, aggr)
