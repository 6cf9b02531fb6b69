r"""Which modules treat each row by itself, and how a route reaches those that do not.

A worker holds some rows of a matrix whose other rows are elsewhere. A linear layer does not mind; a norm over
all nodes does, and must be told of the other rows by a route. What neither works row by row nor takes a route
would give different numbers for different partitions, and is refused here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor

from partpar.errors import RouteError
from partpar.kernels.adjacency import Adjacency
from partpar.nn.source_rows import SourceRows
from partpar.route import Route

# Their statistics run over all rows that they are given.
_OVER_ALL_ROWS = (
    torch.nn.modules.batchnorm._NormBase,  # batch and instance norms
    pyg_nn.BatchNorm,
    pyg_nn.HeteroBatchNorm,
    pyg_nn.InstanceNorm,
    pyg_nn.GraphNorm,
    pyg_nn.GraphSizeNorm,
    pyg_nn.PairNorm,
    pyg_nn.MeanSubtractionNorm,
    pyg_nn.DiffGroupNorm,
    pyg_nn.HeteroLayerNorm,
)

# The rows of owned nodes; constant ones; or those of a sampled block's sources and destinations.
Rows: TypeAlias = Tensor | SourceRows | tuple[Tensor, Tensor]

_owned_first: WeakKeyDictionary[Route, bool] = WeakKeyDictionary()


def takes_route(module: object) -> bool:
    r"""Whether a module's ``forward`` has an argument called ``route``, or :func:`~partpar.nn.route_model` gave it one."""
    forward: Any = getattr(module, "forward", module)
    if getattr(module, "_is_routed", False):
        return True
    return _method_takes_route(forward.__func__) if hasattr(forward, "__func__") else _names_route(forward)


def _names_route(function: Callable[..., Any]) -> bool:
    return "route" in inspect.signature(function).parameters


# Asked at every call of a layer, and reading a signature takes longer than a small layer does.
_method_takes_route = lru_cache(maxsize=None)(_names_route)


def call(module: torch.nn.Module, x: Tensor, route: Route | None) -> Tensor:
    r"""Calls a module on owned rows, handing the route to it, or to those members of a
    :class:`torch.nn.Sequential`, that take one."""
    if isinstance(module, torch.nn.Sequential):
        for member in module:
            x = call(member, x, route)
        return x
    return module(x, route=route) if takes_route(module) else module(x)


def is_over_all_rows(module: object) -> bool:
    r"""Whether a module is a norm whose statistics run over all rows that it is given."""
    graph_wise = isinstance(module, pyg_nn.LayerNorm) and module.mode == "graph"
    return graph_wise or isinstance(module, _OVER_ALL_ROWS)


def refuse_over_all_rows(module: object, where: str) -> None:
    r"""Refuses a module that :func:`call` could not run exactly on some of the rows.

    Args:
        module: A module, or any callable (which is trusted).
        where: What the module is for, to begin the message with.

    Raises:
        ValueError: A member depends on the rows of other workers and no route would reach it.
    """
    if not isinstance(module, torch.nn.Module):
        return
    if isinstance(module, torch.nn.Sequential):
        for member in module:
            refuse_over_all_rows(member, where)
        return
    if takes_route(module):
        return
    for name, member in module.named_modules():
        if takes_route(member):
            advice = (
                "hand it the route: put it straight into a torch.nn.Sequential, or give the forward of "
                f"{type(module).__name__} an argument route"
            )
        elif isinstance(member, pyg_nn.LayerNorm) and member.mode == "graph":
            advice = "use LayerNorm(..., mode='node')"
        elif isinstance(member, _OVER_ALL_ROWS):
            advice = "use partpar.nn.SyncBatchNorm"
        else:
            continue
        at = f" (at {name!r})" if name else ""
        raise ValueError(
            f"{where}: expected modules that work row by row or are handed the route, found "
            f"{type(member).__name__}{at}, which would see one worker's rows instead of the graph's; {advice}"
        )


def of_block(x: Rows, edge_index: Tensor | Adjacency, route: Route | None) -> Rows:
    r"""The pair ``(sources, destinations)`` where :obj:`x` holds the rows of all sources of a sampled block, of which
    the first are its destinations; :obj:`x` itself otherwise."""
    if route is not None or not isinstance(x, Tensor) or not isinstance(edge_index, Adjacency):
        return x
    if x.size(0) != edge_index.num_src or edge_index.num_dst >= edge_index.num_src:
        return x
    return x, x[: edge_index.num_dst]


def with_halo(x: Rows, route: Route | None) -> Tensor:
    r"""``[num_owned, *]`` to ``[num_src, *]``; without a route all rows are owned."""
    if isinstance(x, tuple):
        return x[0]
    if isinstance(x, SourceRows):
        return x.rows
    return x if route is None else route.apply(x)


def owned(x: Rows) -> Tensor:
    r"""``[num_owned, *]``."""
    if isinstance(x, tuple):
        return x[1]
    return x.owned if isinstance(x, SourceRows) else x


def through(
    row_wise: Callable[[Tensor], Tensor], x: Rows, route: Route | None
) -> tuple[Tensor, Tensor]:
    r"""``(sources, destinations)`` after a map of each row, which is applied before rows travel."""
    if isinstance(x, tuple):
        sources, prefix = row_wise(x[0]), x[1].data_ptr() == x[0].data_ptr()
        return sources, sources[: x[1].size(0)] if prefix else row_wise(x[1])
    if isinstance(x, SourceRows):
        sources = row_wise(x.rows)
        return sources, sources[: x.owned.size(0)]
    rows = row_wise(x)
    return with_halo(rows, route), rows


def check_edges(
    layer: object,
    x: Rows,
    edge_index: Tensor | Adjacency,
    route: Route | None = None,
    **per_edge: Tensor | None,
) -> None:
    r"""Refuses, before any exchange, rows and edges that do not fit.

    Raises:
        ValueError: :obj:`x` is a pair without a sampled block's adjacency, :obj:`edge_index` is neither an adjacency
            nor a dense ``[2, E]``, or an edge attribute has another number of rows.
    """
    name = type(layer).__name__
    if isinstance(x, tuple) and isinstance(edge_index, Adjacency) and route is None:
        _check_block(name, x, edge_index)
        _check_per_edge(name, edge_index.num_edges, per_edge)
        return
    x = x if isinstance(x, tuple) else owned(x)
    if not isinstance(x, Tensor) or x.dim() != 2:
        found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise RouteError(
            f"{name}: expected x to be the [num_owned, channels] rows of the owned nodes, found {found}; the "
            f"route fetches the halo"
        )
    if route is not None and x.size(0) != route.num_owned:
        route.refuse(f"{name}: expected {route.num_owned} rows (one for each owned node), found {x.size(0)}")
    if isinstance(edge_index, Adjacency):
        num_src = x.size(0) if route is None else route.num_src
        if edge_index.num_dst != x.size(0) or edge_index.num_src != num_src:
            found = (
                f"{name}: expected the adjacency of {x.size(0)} owned nodes and {num_src} sources, found one of "
                f"{edge_index.num_dst} and {edge_index.num_src}; "
            )
            if route is None:
                raise RouteError(found + "a share with a halo needs its route: pass route=share.to_route()")
            route.refuse(found + "pass share.adj() of the share whose rows and route these are")
        _check_per_edge(name, edge_index.num_edges, per_edge)
        return
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        kind = edge_index.layout if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise RouteError(
            f"{name}: expected edge_index as a dense [2, E] tensor or an adjacency, found {kind}; "
            f"pass share.edge_index() or share.adj()"
        )
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise RouteError(f"{name}: expected edge_index of shape (2, E), found {tuple(edge_index.shape)}")
    _check_per_edge(name, edge_index.size(1), per_edge)


def _check_block(name: str, x: tuple[Tensor, Tensor], adj: Adjacency) -> None:
    found = tuple(rows.size(0) if isinstance(rows, Tensor) and rows.dim() == 2 else None for rows in x)
    if found != (adj.num_src, adj.num_dst):
        raise RouteError(
            f"{name}: expected rows of the {adj.num_src} sources and {adj.num_dst} destinations of a block, found {found}; "
            f"rows of layer i belong to block i, see partpar.sampling.blocks"
        )


def _check_per_edge(name: str, num_edges: int, per_edge: Mapping[str, Tensor | None]) -> None:
    for what, rows in per_edge.items():
        if rows is not None and rows.size(0) != num_edges:
            raise RouteError(
                f"{name}: expected {what} to have a row for each of the {num_edges} edges, found shape {tuple(rows.shape)}"
            )


def check_owned_first(layer: object, route: Route | None) -> None:
    r"""Refuses a route whose source rows are not the owned rows followed by others, as those of a share are.

    Raises:
        ValueError: Row ``i`` of the sources need not be owned row ``i``.
    """
    if route is None or route.order is None:
        return
    if route not in _owned_first:
        owned = torch.arange(route.num_owned, device=route.order.device)
        _owned_first[route] = torch.equal(route.order[: route.num_owned], owned)
    if not _owned_first[route]:
        raise RouteError(
            f"{type(layer).__name__}: expected a route whose sources are the {route.num_owned} owned rows in "
            f"their order and then the halo, found one in another order; build it by share.to_route()"
        )


def check_flow(layer: object, flow: str) -> None:
    r"""Refuses messages against the direction of edges: an edge lives with its destination.

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``.
    """
    if flow != "source_to_target":
        raise ValueError(
            f"{type(layer).__name__}: expected flow='source_to_target', since a worker keeps the in-edges of "
            f"its nodes, found {flow!r}; partition the reversed graph instead"
        )
