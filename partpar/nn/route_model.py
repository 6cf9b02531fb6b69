r"""Existing PyG models, partition-parallel without a change to their code."""

from __future__ import annotations

import copy
import inspect
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch.fx import GraphModule
from torch_geometric.inspector import Inspector

from partpar.errors import RouteError
from partpar.hetero_route import HeteroRoute
from partpar.kernels.adjacency import Adjacency
from partpar.nn.dropout import Dropout
from partpar.nn.gat import GATConv, GATv2Conv
from partpar.nn.gcn import GCNConv
from partpar.nn.han import HANConv
from partpar.nn.hetero_conv import HeteroConv
from partpar.nn.hgt import HGTConv
from partpar.nn.matrix import AdjacencyMatrix
from partpar.nn.neighbourhood import edge_index_of
from partpar.nn.norm import with_global_statistics
from partpar.nn.routed import takes_pair
from partpar.nn.rows import check_flow, check_owned_first, is_over_all_rows, owned, takes_route, with_halo
from partpar.nn.typed_graph_module import fetch_by_layer, type_called
from partpar.route import Route

AnyRoute = Route | HeteroRoute

# Layers that cannot be called with (sources, owned), or are faster otherwise, and ours that take their state as it is.
_TWINS: dict[type, type] = {
    pyg_nn.GCNConv: GCNConv,
    pyg_nn.GATConv: GATConv,
    pyg_nn.GATv2Conv: GATv2Conv,
    pyg_nn.HeteroConv: HeteroConv,
    pyg_nn.HGTConv: HGTConv,
    pyg_nn.HANConv: HANConv,
}

_route: ContextVar[AnyRoute | None] = ContextVar("partpar_route", default=None)


def route_model(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    r"""Turns an existing PyG model into its partition-parallel twin, without editing its code.

    .. code-block:: python

        model = route_model(torch_geometric.nn.GraphSAGE(16, 64, 2, 7, norm="batch_norm"))
        out = model(x, share.adj(), route=route)                     # rows of the owned nodes in and out

        model = route_model(to_hetero(model, data.metadata()))
        out = model(share.collect("x"), share.adj_dict(), route=share.to_route())

    Convolutions get the halo of their sources: in a model made by :func:`torch_geometric.nn.to_hetero`, or built of
    :class:`~torch_geometric.nn.HeteroConv`, :class:`~torch_geometric.nn.HGTConv` or
    :class:`~torch_geometric.nn.HANConv`, one exchange for each layer brings that of all types. Batch norms take the
    statistics of all workers. :class:`torch.nn.Dropout` of a one-type or ``to_hetero`` model draws by raw id, as
    :class:`~partpar.nn.Dropout`, so that any number of workers drops the same entries; other random draws stay the
    model's own. What a model does to all rows outside of its modules, such as a mean over nodes, cannot be seen here
    and stays local.

    Args:
        model: A model of one-type layers, called with the rows of the owned nodes and the share's edges, dense or as
            ``share.adj()``; or one of a typed graph, called with mappings of these. It stays as it is.
        seed: Of dropout, the same on every rank.

    Returns:
        A copy. Its ``forward`` has the same signature plus ``route``, by name; without a route one process owns
        everything. The keys of its ``state_dict`` are those of :obj:`model`, apart from dropout's step counters.

    Raises:
        ValueError: A layer cannot be made exact: it takes no pair ``(x_src, x_dst)``, sends messages from target to
            source, or is a norm over all rows other than batch norm.
    """
    if takes_route(model):
        raise ValueError(
            f"route_model: expected a model that knows nothing of routes, found {type(model).__name__}, whose forward takes one"
        )
    routed = copy.deepcopy(model)
    typed = isinstance(routed, GraphModule)
    if type(routed) in _TWINS or isinstance(routed, pyg_nn.MessagePassing):
        _route_conv(routed, "", typed)
    _visit(routed, "", typed, {})
    dropouts = (member for member in routed.modules() if isinstance(member, Dropout))
    for number, dropout in enumerate(dropouts):  # the same on every rank, whatever was made there before
        dropout.seed, dropout.layer = seed, number
    if isinstance(routed, GraphModule):
        fetch_by_layer(routed, _route)
    routed._is_routed = True  # type: ignore[assignment]
    call = _Call()
    routed.register_forward_pre_hook(call.enter, with_kwargs=True, prepend=True)
    routed.register_forward_hook(call.leave, with_kwargs=True, always_call=True)
    return routed


def _visit(parent: torch.nn.Module, path: str, typed: bool, done: dict[int, torch.nn.Module]) -> None:
    """Replaces or hooks every member that is more than a map of each row."""
    for name, child in list(parent.named_children()):
        at = f"{path}.{name}" if path else name
        if id(child) not in done:
            made = _made_of(child, at, typed)
            done[id(child)] = made
            if made is child and type(child) is not HeteroConv:  # which calls its convolutions itself
                _visit(child, at, typed, done)
        parent._modules[name] = done[id(child)]


def _made_of(child: torch.nn.Module, at: str, typed: bool) -> torch.nn.Module:
    if is_over_all_rows(child):
        made = with_global_statistics(child, f"route_model, at {at!r}")
        made.register_forward_pre_hook(_GiveRoute(), with_kwargs=True)
        return made
    if type(child) is torch.nn.Dropout and child.p > 0:
        dropout = Dropout(child.p).train(child.training)
        dropout.register_forward_pre_hook(_GiveRoute(of_type=at if typed else ""), with_kwargs=True)
        return dropout
    if type(child) in _TWINS or isinstance(child, pyg_nn.MessagePassing):
        _route_conv(child, at, typed)
    return child


def _route_conv(conv: Any, at: str, typed: bool) -> None:
    """Makes a convolution's calls exact, in place: its parameters and their names stay."""
    check_flow(conv, getattr(conv, "flow", "source_to_target"))
    twin = None if typed else _TWINS.get(type(conv))  # `to_hetero` calls with pairs already
    if twin is None:
        if not takes_pair(conv):
            raise ValueError(
                f"route_model: expected convolutions that take a pair (x_src, x_dst), found {type(conv).__name__} at "
                f"{at!r}, whose forward takes a single tensor; use a layer of partpar.nn there"
            )
        conv.register_forward_pre_hook(_Pair(fetched=typed), with_kwargs=True)
        return
    names = tuple(
        p.name for p in inspect.signature(type(conv).forward).parameters.values() if p.kind != p.VAR_POSITIONAL
    )[1:]
    of_dicts = twin is HeteroConv
    conv.__class__ = twin
    if isinstance(conv, pyg_nn.MessagePassing):
        conv.inspector = Inspector(twin)
        for method in (conv.message, conv.message_and_aggregate, conv.update, conv.edge_update):
            conv.inspector.inspect_signature(method)
        conv.inspector.inspect_signature(conv.aggregate, exclude=[0, "aggr"])
    if hasattr(conv, "dropout"):
        conv.attention_dropout = Dropout(conv.dropout)
    if of_dicts:
        conv.check()
    conv.register_forward_pre_hook(_GiveRoute(names=() if of_dicts else names), with_kwargs=True)


@dataclass
class _Call:
    """The outermost call: what is below finds the route here."""

    tokens: list[Token[AnyRoute | None]] = field(default_factory=list)

    def enter(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        route = kwargs.pop("route", None)
        if route is not None and not isinstance(route, AnyRoute):
            raise RouteError(
                f"{type(module).__name__}: expected route=share.to_route(), found {type(route).__name__}"
            )
        self.tokens.append(_route.set(route))
        return args, kwargs

    def leave(self, module: torch.nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.tokens:  # none where the call was refused
            _route.reset(self.tokens.pop())


@dataclass
class _GiveRoute:
    """Hands the route to a layer that takes one.

    Args:
        names: The layer's arguments as PyG orders them, which are then passed by name.
        of_type: The path of a member that works on the rows of one node type, whose route it then gets.
    """

    names: tuple[str, ...] = ()
    of_type: str = ""

    def __call__(
        self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        route = _route.get()
        if self.of_type and isinstance(route, HeteroRoute):
            route = route[type_called(self.of_type.rpartition(".")[2], route)]
        if self.names:
            kwargs = dict(zip(self.names, args, strict=False)) | kwargs
            if kwargs.pop("size", None) is not None:
                raise RouteError(f"{type(module).__name__}: expected no size, which the share's edges tell")
            args = ()
        return args, kwargs | {"route": route}


@dataclass
class _Pair:
    """Calls a convolution with ``(sources, owned)``.

    Args:
        fetched: Whether the layer before has brought the halo already.
    """

    fetched: bool = False

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = list(inspect.signature(module.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        (x_name, x), (edges_name, edges) = list(given.items())[:2]
        route = None if self.fetched else _route.get()
        if isinstance(route, HeteroRoute):
            raise RouteError(
                f"{type(module).__name__}: expected to be called through HeteroConv or in a model made by to_hetero, since "
                "rows of which type these are cannot be told; found it called by itself with a route of several types"
            )
        if not self.fetched and (route is not None or not isinstance(x, tuple | torch.Tensor)):
            check_owned_first(module, route)
            pair = x if isinstance(x, tuple) else (x, x)
            given[x_name] = (with_halo(pair[0], route), None if pair[1] is None else owned(pair[1]))
        if isinstance(edges, Adjacency):
            alone = all(value is None for name, value in given.items() if name not in (x_name, edges_name))
            rows = given[x_name][0] if isinstance(given[x_name], tuple) else given[x_name]
            fused = getattr(module, "fuse", False) and alone
            given[edges_name] = AdjacencyMatrix(edges, rows.dtype) if fused else edge_index_of(edges)
        return (), given
