r"""The route of a typed graph: one plan for each node type, one exchange for all of them.

The rows of all types that go to a peer are laid one behind another into one block, so that an exchange costs one message
to a peer however many types there are. The plans are those of :class:`partpar.Route`, the exchange is that of
:mod:`partpar.transfer`; packing and unpacking are plain torch, so that gradients of any order follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import RouteError
from partpar.graph.structure import EdgeType
from partpar.route import REDUCTIONS, Route
from partpar.transfer import Blocks, BlocksInFlight, join

Rows = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class HeteroRoute(Mapping[str, Route]):
    r"""Moves rows of several node types between owners and halos, in a single exchange. A mapping from node type to that
    type's :class:`~partpar.Route`, which all share one process group; build it by ``share.to_route()``.

    Args:
        routes: The plan of each node type.
        relations: For each edge type, ``[num_src]`` bool: which rows of its source type some edge of it needs here.
    """

    routes: Mapping[str, Route]
    relations: Mapping[EdgeType, Tensor] = field(default_factory=dict)
    _checks: exchange.Checks = field(default_factory=exchange.Checks, repr=False)

    def __post_init__(self) -> None:
        if not self.routes:
            raise RouteError("HeteroRoute: expected at least one node type, found none")
        if len({id(route.group) for route in self.routes.values()}) > 1:
            raise RouteError(
                "HeteroRoute: expected routes over one process group, found several; build all from the same group"
            )

    @classmethod
    def trivial(cls, num_nodes: Mapping[str, int]) -> HeteroRoute:
        r"""The route of one process that owns everything."""
        return cls({node_type: Route.trivial(n) for node_type, n in num_nodes.items()})

    # --- facts --------------------------------------------------------------------------------------------------

    __eq__ = object.__eq__  # a mapping's would compare tensors
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        sizes = [f"{t}: {r.num_owned} owned, {r.num_halo} halo, {sum(r.send_splits)} sent" for t, r in self.items()]
        return f"HeteroRoute(rank {self.rank} of {self.world_size}: {'; '.join(sizes)})"

    def __getitem__(self, node_type: str) -> Route:
        if node_type not in self.routes:
            raise RouteError(f"expected a node type of {list(self.routes)}, found {node_type!r}")
        return self.routes[node_type]

    def __contains__(self, node_type: object) -> bool:
        return node_type in self.routes

    def __iter__(self) -> Iterator[str]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    @property
    def group(self) -> ProcessGroup | None:
        r"""The routes' own process group; :obj:`None` when alone."""
        return next(iter(self.routes.values())).group

    @property
    def rank(self) -> int:
        return exchange.rank_and_size(self.group)[0]

    @property
    def world_size(self) -> int:
        return exchange.rank_and_size(self.group)[1]

    def bytes_per_peer(
        self, width: int | Mapping[str, int], dtype: torch.dtype = torch.float32
    ) -> list[int]:
        r"""Bytes that one :meth:`apply` sends to each rank (to this one: 0).

        Args:
            width: Elements of a row; a mapping names the types that travel and the width of each.
            dtype: Of all rows.
        """
        widths = dict.fromkeys(self.routes, width) if isinstance(width, int) else width
        of_types = [self[node_type].bytes_per_peer(n, dtype) for node_type, n in widths.items()]
        return [sum(of_peer) for of_peer in zip([0] * self.world_size, *of_types, strict=True)]

    def with_policy(self, wire_dtype: torch.dtype | None = None) -> HeteroRoute:
        r"""The same plans under another policy; see :meth:`partpar.Route.with_policy`."""
        return HeteroRoute({t: r.with_policy(wire_dtype) for t, r in self.routes.items()}, self.relations)

    def to(self, device: torch.device | str) -> HeteroRoute:
        r"""The same plans with their tables on :obj:`device`."""
        return HeteroRoute(
            {t: r.to(device) for t, r in self.routes.items()},
            {relation: mask.to(device) for relation, mask in self.relations.items()},
        )

    # --- moving rows --------------------------------------------------------------------------------------------

    def apply(self, x: Rows) -> dict[str, Tensor]:
        r"""Copies owner to halo for every type named, in one exchange. Its gradient is the transpose, also in one.

        Args:
            x: For each type that is to travel ``[num_owned, *]``; all of one dtype, of any widths.

        Returns:
            For each of them ``[num_src, *]``: the owned rows, then the halo.

        Raises:
            RouteError: A type is unknown, dtypes differ, or rows do not fit their type; on every rank.
        """
        return self.apply_begin(x).wait()

    def apply_begin(self, x: Rows) -> HeteroInFlight:
        r"""Begins an :meth:`apply`; interior work may be done before ``wait()``. Several may be in flight."""
        self._check("apply", x)
        return HeteroInFlight(x, self)

    def reduce(self, x: Rows, op: str = "sum") -> dict[str, Tensor]:
        r"""Combines every owned row with its copies in the halos of all peers; see :meth:`partpar.Route.reduce`.

        Args:
            x: For each type ``[num_src, *]``; all of one dtype.
            op: ``"sum"`` and ``"mean"`` move all types in one exchange, ``"max"`` and ``"min"`` take one for each type.

        Returns:
            For each type ``[num_owned, *]``.
        """
        if op not in REDUCTIONS:
            wrong = f"reduce: expected op to be one of {', '.join(REDUCTIONS)}; found {op!r}"
            exchange.agree(self.group, "reduce", {}, wrong)
        self._check(f"reduce({op})", x, of_sources=True)
        if op in ("max", "min"):
            return {node_type: self[node_type].reduce(rows, op) for node_type, rows in x.items()}
        sums = self._sum_copies(x)
        if op == "sum" or not sums:
            return sums
        ones = {t: rows.new_ones((rows.size(0), *[1] * (rows.dim() - 1))) for t, rows in x.items()}
        counts = self._sum_copies({t: rows.detach() for t, rows in ones.items()})
        return {t: rows / counts[t].clamp(min=1) for t, rows in sums.items()}

    def restrict(self, wanted: Mapping[str, Tensor] | list[EdgeType]) -> HeteroRoute:
        r"""The sub-route that only moves the wanted rows (collective).

        Args:
            wanted: Edge types: of each source type travel the rows that an edge of these needs, and nothing of any other
                type. Or for each node type a mask ``[num_src]`` of bool, which must hold the same types on every rank;
                types not named keep all their rows.

        Returns:
            A route over the same owned rows; :meth:`apply` returns the owned rows and the wanted halo. The share of these
            edge types with sources numbered so is :meth:`GraphData.edge_type_subgraph`.

        Raises:
            RouteError: An edge type is unknown, or a mask does not fit; on every rank.
        """
        relations = self.relations
        if not isinstance(wanted, Mapping):
            unknown = [relation for relation in wanted if relation not in relations]
            wrong = None
            if unknown:
                known = list(relations) or "none, as the route was not built by share.to_route()"
                wrong = f"restrict: expected edge types of the share ({known}), found {unknown[0]}"
            exchange.agree(self.group, "restrict", {"number of edge types": len(wanted)}, wrong)
            relations = {relation: relations[relation] for relation in wanted}
            wanted = {t: self._needed_by(t, relations) for t in self}
        named = ", ".join(sorted(wanted))
        unknown_types = sorted(set(wanted) - set(self.routes))
        wrong = None
        if unknown_types:
            wrong = f"restrict: expected node types of {list(self)}, found {unknown_types[0]!r}"
        exchange.agree(self.group, f"restrict({named})", {}, wrong)
        routes = {t: r.restrict(wanted[t]) if t in wanted else r for t, r in self.routes.items()}
        kept = {
            relation: mask[wanted[relation[0]]] if relation[0] in wanted else mask
            for relation, mask in relations.items()
        }
        return HeteroRoute(routes, kept)

    def _needed_by(self, node_type: str, relations: Mapping[EdgeType, Tensor]) -> Tensor:
        """The owned rows of a type, and those of its halo that some relation needs."""
        route = self[node_type]
        mask = torch.zeros(route.num_src, dtype=torch.bool, device=route.raw_ids.device)
        mask[: route.num_owned] = True
        for relation, needed in relations.items():
            if relation[0] == node_type:
                mask |= needed
        return mask

    # --- within -------------------------------------------------------------------------------------------------

    def _check(self, what: str, x: Rows, of_sources: bool = False) -> None:
        """Refuses bad rows on every rank before any rank sends."""
        wrong = None
        if not isinstance(x, Mapping):
            wrong = (
                f"{what}: expected rows by node type ({{type: x}}), found {type(x).__name__}; route[type] is the "
                f"route of one type"
            )
            x = {}
        unknown = [t for t in x if t not in self.routes]
        dtypes = {rows.dtype for rows in x.values() if isinstance(rows, Tensor)}
        if unknown:
            wrong = f"{what}: expected node types of {list(self)}, found {unknown[0]!r}"
        elif len(dtypes) > 1:
            wrong = (
                f"{what}: expected rows of one dtype, which travel together, found {sorted(map(str, dtypes))}; move "
                f"the others by route[type].{what.split('(')[0]}"
            )
        if self._checks.due(*((what, *x) if wrong is None else ())):
            exchange.agree(self.group, f"{what} of {', '.join(x)}", {"number of types": len(x)}, wrong)
        elif wrong is not None:
            raise RouteError(wrong)
        for node_type, rows in x.items():
            route = self[node_type]
            num_rows = route.num_src if of_sources else route.num_owned
            route.check(f"{what} of {node_type!r}", rows, num_rows)

    def _sum_copies(self, x: Rows) -> dict[str, Tensor]:
        if not x:
            return {}
        lay = _Layout.of(self, x)
        inner = {}
        for t, rows in x.items():
            route = self[t]
            if route.order is not None:
                shape = (route.num_owned + route.num_halo, *rows.shape[1:])
                rows = rows.new_zeros(shape).index_add(0, route.order, rows)
            inner[t] = rows
        halo = {t: rows[self[t].num_owned :] for t, rows in inner.items()}
        there = BlocksInFlight(lay.pack(halo, lay.received), lay.blocks.back()).wait()
        return {
            t: inner[t][: self[t].num_owned].index_add(0, self[t].send_index, copies)
            for t, copies in lay.unpack(there, lay.sent).items()
        }


class HeteroInFlight:
    r"""A :meth:`HeteroRoute.apply` that has begun."""

    def __init__(self, x: Rows, route: HeteroRoute) -> None:
        self._x, self._route = dict(x), route
        if self._x:
            self._layout = _Layout.of(route, x)
            rows = {t: r.index_select(0, route[t].send_index) for t, r in self._x.items()}
            self._rows = BlocksInFlight(self._layout.pack(rows, self._layout.sent), self._layout.blocks)

    def wait_halo(self) -> dict[str, Tensor]:
        r"""Awaits and returns the ``[num_halo, *]`` halo rows of each type alone."""
        return self._layout.unpack(self._rows.wait(), self._layout.received) if self._x else {}

    def wait(self) -> dict[str, Tensor]:
        r"""Awaits the halo and returns what :meth:`HeteroRoute.apply` would."""
        halo = self.wait_halo()
        out = {t: join(self._x[t], rows) for t, rows in halo.items()}
        orders = {t: self._route[t].order for t in out}
        return {t: rows if (o := orders[t]) is None else rows.index_select(0, o) for t, rows in out.items()}


@dataclass(frozen=True)
class _Layout:
    """How rows of several types lie in one column of elements: by peer, then by type.

    Args:
        shapes: The trailing shape of each type's rows.
        sent: For each type, its rows to each rank; likewise ``received``.
        blocks: Elements to and from each rank.
    """

    shapes: dict[str, torch.Size]
    sent: dict[str, tuple[int, ...]]
    received: dict[str, tuple[int, ...]]
    blocks: Blocks

    @classmethod
    def of(cls, route: HeteroRoute, x: Rows) -> _Layout:
        shapes = {t: rows.shape[1:] for t, rows in x.items()}
        sent = {t: route[t].send_splits for t in x}
        received = {t: route[t].recv_splits for t in x}
        wire_dtype = next(route[t].blocks.wire_dtype for t in x)

        def elements(splits: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
            of_types = [[n * shapes[t].numel() for n in splits[t]] for t in splits]
            return tuple(map(sum, zip(*of_types, strict=True)))

        return cls(shapes, sent, received, Blocks(elements(sent), elements(received), route.group, wire_dtype))

    def pack(self, rows: Rows, splits: Mapping[str, tuple[int, ...]]) -> Tensor:
        """``[elements, 1]``: a column, since autograd loses the way to an empty tensor of one dimension."""
        of_types = [rows[t].split(list(splits[t])) for t in self.shapes]
        return torch.cat([block.reshape(-1, 1) for of_peer in zip(*of_types, strict=True) for block in of_peer])

    def unpack(self, column: Tensor, splits: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The rows of each type, blocks in rank order."""
        types = list(self.shapes)
        sizes = [
            n * self.shapes[t].numel()
            for of_peer in zip(*(splits[t] for t in types), strict=True)
            for t, n in zip(types, of_peer, strict=True)
        ]
        pieces = column.split(sizes)
        out = {}
        for i, t in enumerate(types):
            blocks = pieces[i :: len(types)]
            whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            out[t] = whole.reshape(sum(splits[t]), *self.shapes[t])
        return out
