r"""Rows of several node types and edges of several relations, as the layers of typed graphs take them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.graph import EdgeType
from partpar.hetero_route import HeteroRoute
from partpar.kernels.adjacency import Adjacency
from partpar.nn.neighbourhood import kept
from partpar.nn.rows import check_owned_first, owned
from partpar.nn.source_rows import SourceRows
from partpar.route import Route

HeteroRows: TypeAlias = Mapping[str, Tensor | SourceRows]
HeteroEdges: TypeAlias = Mapping[EdgeType, Tensor | Adjacency]


def keep_halos(x: Mapping[str, Tensor], route: HeteroRoute | None = None) -> dict[str, SourceRows]:
    r"""Declares the rows of several types constant and fetches their halo, once and in one exchange (collective). The
    typed form of :func:`~partpar.nn.keep_halo`.

    Args:
        x: For each type ``[num_owned, C]``, rows that need no gradient, such as input features.
        route: The share's route; :obj:`None` when one process owns everything.

    Raises:
        RouteError: Rows require a gradient, so they are not constant.
    """
    for node_type, rows in x.items():
        if rows.requires_grad:
            wrong = f"keep_halos: expected constant rows, found rows of {node_type!r} that require a gradient"
            if route is None:
                raise RouteError(wrong)
            route[node_type].refuse(wrong)
    kept_rows = {t: SourceRows(rows, None if route is None else route[t]) for t, rows in x.items()}
    if route is not None and route.group is not None:
        with torch.no_grad():
            fetched = route.apply(x)
        for t, rows in fetched.items():
            kept_rows[t].keep("rows", lambda rows=rows: rows)  # type: ignore[misc]
    return kept_rows


def _by_type(route: HeteroRoute | Route | None, x: HeteroRows) -> HeteroRoute | None:
    r"""The route of all types; a graph of one node type has that type's alone."""
    if not isinstance(route, Route):
        return route
    if len(x) != 1:
        raise RouteError(
            f"expected the route of all node types ({', '.join(x)}), share.to_route(), found that of one type"
        )
    return HeteroRoute({next(iter(x)): route}, _checks=route._checks)


def sources(x: HeteroRows, route: HeteroRoute | None, types: Iterable[str]) -> dict[str, Tensor]:
    r"""``[num_src, *]`` for each of some types, in one exchange; constant rows bring their halo along."""
    wanted = dict.fromkeys(types)
    given = {t: x[t] for t in wanted}
    out = {t: rows.rows for t, rows in given.items() if isinstance(rows, SourceRows)}
    moving = {t: rows for t, rows in given.items() if isinstance(rows, Tensor)}
    return out | (moving if route is None or not moving else route.apply(moving))


def check_relations(
    layer: object, x: HeteroRows, edges: HeteroEdges, given: HeteroRoute | Route | None
) -> HeteroRoute | None:
    r"""The route of all types. Refuses, before any exchange, rows and edges that do not fit it.

    Raises:
        RouteError: A type of an edge type has no rows, or an adjacency is not that of the route's share.
    """
    name, route = type(layer).__name__, _by_type(given, x)
    wrong = None
    for edge_type, piece in edges.items():
        missing = {edge_type[0], edge_type[2]} - set(x)
        if missing:
            wrong = f"{name}: expected rows of the ends of {edge_type}, found none of {sorted(missing)}"
            break
        num_dst = owned(x[edge_type[2]]).size(0)
        num_src = owned(x[edge_type[0]]).size(0) if route is None else route[edge_type[0]].num_src
        if isinstance(piece, Adjacency) and (piece.num_src, piece.num_dst) != (num_src, num_dst):
            remedy = "pass share.adj_dict() and the same share's route and rows"
            if route is None and piece.num_src > num_src:
                remedy = "a share with a halo needs its route: pass route=share.to_route()"
            wrong = (
                f"{name}: expected the adjacency of {num_src} sources and {num_dst} destinations for {edge_type}, found "
                f"one of {piece.num_src} and {piece.num_dst}; {remedy}"
            )
    if route is not None:
        for node_type, rows in x.items():
            route_of = route[node_type]
            check_owned_first(layer, route_of)
            if owned(rows).size(0) != route_of.num_owned:
                wrong = f"{name}: expected {route_of.num_owned} rows of {node_type!r}, found {owned(rows).size(0)}"
    if wrong is not None and route is not None:
        next(iter(route.values())).refuse(wrong)
    if wrong is not None:
        raise RouteError(wrong)
    return route


def adjacency(piece: Tensor | Adjacency, num_src: int, num_dst: int) -> Adjacency:
    r"""Edges as kernels read them; those of a tensor are sorted anew at each call."""
    return piece if isinstance(piece, Adjacency) else Adjacency.from_edge_index(piece, num_src, num_dst)


def join(pieces: list[Adjacency]) -> tuple[Adjacency, Tensor]:
    r"""The edges of several relations into the same destinations as one adjacency, whose sources are those of the
    relations one behind another; and for each of its edges the number of its relation. Made once."""
    whole, order = _joined(pieces)

    def build() -> Tensor:
        sizes = torch.tensor([piece.num_edges for piece in pieces])
        return torch.repeat_interleave(sizes)[order]

    return whole, kept(whole, None, "numbers of relations", build)


def join_means(pieces: list[Adjacency], dtype: torch.dtype) -> tuple[Adjacency, Tensor]:
    r"""As :func:`join`, and for each edge one over the degree of its destination in the edge's own relation."""
    whole, order = _joined(pieces)

    def build() -> Tensor:
        return torch.cat([piece.mean_weight(dtype) for piece in pieces])[order]

    return whole, kept(whole, None, ("means of relations", dtype), build)


def _joined(pieces: list[Adjacency]) -> tuple[Adjacency, Tensor | slice]:
    """One adjacency, and where each of its edges stands when those of the pieces are laid one behind another."""
    if len(pieces) == 1:
        return pieces[0], slice(None)

    def build() -> tuple[list[Adjacency], Adjacency, Tensor]:
        starts, ends, first = [], [], 0
        for piece in pieces:
            starts.append(piece.indices.long() + first)
            ends.append(piece.destinations.long())
            first += piece.num_src
        edge_index = torch.stack([torch.cat(starts), torch.cat(ends)])
        whole = Adjacency.from_edge_index(edge_index, first, pieces[0].num_dst)
        assert whole.edge_ids is not None
        return pieces, whole, whole.edge_ids  # with the pieces, so that ids stay theirs

    made: Any = kept(pieces[0], None, ("joined", tuple(map(id, pieces))), build)
    return made[1], made[2]
