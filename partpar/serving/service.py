r"""The whole graph, asked from one part: hops and rows of whoever owns them.

A request is split by owner, each owner is sent one message, this part's own rows are answered meanwhile, and what comes
back is put in the order of the request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from partpar.errors import GraphError, IdError
from partpar.graph import EdgeType
from partpar.kernels.table import place_ids
from partpar.serving.buffers import Buffers
from partpar.serving.flights import HopsInFlight, OneTypeInFlight, RowsInFlight, Split
from partpar.serving.later import Patient
from partpar.serving.messages import HopRequest
from partpar.serving.owner import Owner, Type, column_of, frame_of, take
from partpar.serving.raw_ids import Directory
from partpar.serving.transport import Handler, InFlight, Transport

_PUT_BYTES = 16 << 20  # of rows in one message


class Service:
    r"""Answers for the whole graph, whoever owns what is asked for; made by
    :func:`~partpar.serving.start.start_service`. A context manager.

    Methods may be called from several threads, on any rank and at any time; none is collective but the start.

    Args:
        owner: This part's own answers.
        transport: The way to all parts.
        timeout: Seconds until a part that does not answer counts as lost.
    """

    def __init__(self, owner: Owner, transport: Transport, timeout: float = 60.0) -> None:
        self.owner, self.transport, self.share, self.cache = owner, transport, owner.share, owner.cache
        self.part_id, self.num_parts = self.share.part_id, self.share.num_parts
        self._offsets: dict[Type, Tensor] = {t: self.share.offsets(t) for t in self.share.node_types}
        self._directory = Directory(self.share, self._starts, transport, owner.verbs, timeout)
        self._timeout, self._buffers = timeout, Buffers()
        owner.fetch_rows = lambda kind, name, ids: self._bring(kind, name)(ids)
        self._closed = False

    # --- what there is ------------------------------------------------------------------------------------------

    @property
    def node_types(self) -> list[str]:
        return self.share.node_types

    @property
    def edge_types(self) -> list[EdgeType]:
        return self.share.edge_types

    def offsets(self, node_type: str) -> Tensor:
        r"""``[num_parts + 1]`` int64: part p owns ids ``offsets[p]`` to ``offsets[p + 1] - 1``."""
        return self._offsets[self.share._node_type(node_type)]

    def edge_offsets(self, edge_type: EdgeType) -> Tensor:
        r"""The same for the ids of edges: an edge's id is its part's offset plus its place in the share."""
        name = self.share._edge_type(edge_type)
        if name not in self._offsets:
            asked = [self.transport.begin(p, "describe", {}) for p in range(self.num_parts)]
            counts = torch.stack([flight.wait()["num_edges"] for flight in asked])
            for k, kind in enumerate(self.share.edge_types):
                self._offsets[kind] = torch.cat([counts.new_zeros(1), counts[:, k].cumsum(0)])
        return self._offsets[name]

    def has_node_attr(self, node_type: str, name: str) -> bool:
        return name in self.share.node(node_type)

    def has_edge_attr(self, edge_type: EdgeType, name: str) -> bool:
        return name in self.share.edge(edge_type)

    # --- hops ---------------------------------------------------------------------------------------------------

    def hop_begin(self, requests: Mapping[EdgeType, HopRequest]) -> HopsInFlight:
        r"""Asks the owners of all destinations for one hop, at once and with one message to each.

        Args:
            requests: For each edge type; destinations may be anybody's, in any order.
        """
        flight = HopsInFlight(requests, {}, {})
        asked: dict[int, list[tuple[EdgeType, Tensor]]] = {}
        own: list[tuple[EdgeType, Tensor]] = []
        for edge_type, request in requests.items():
            flight.index[edge_type], flight.replies[edge_type] = [], []
            pieces = self._split(edge_type[2], request.ids).pieces(self.part_id)
            for part, (places, _) in pieces.items():
                (own if part == self.part_id else asked.setdefault(part, [])).append((edge_type, places))
        for part, wanted in asked.items():
            tensors: dict[str, Tensor] = {}
            values: dict[str, Any] = {}
            for k, (edge_type, places) in enumerate(wanted):
                mine, values[str(k)] = requests[edge_type].take(places).to_wire()
                tensors.update({f"{k}/{name}": tensor for name, tensor in mine.items()})
            answer = Patient(self.transport, part, "sample", tensors, values, self._timeout)
            flight.asked.append((answer, [edge_type for edge_type, _ in wanted]))
        for edge_type, places in own:
            request = requests[edge_type]
            part_of_it = request if places.numel() == request.ids.numel() else request.take(places)
            flight.replies[edge_type].append(self.owner.hop(part_of_it))
            flight.index[edge_type].append(places)
        for wanted in asked.values():
            for edge_type, places in wanted:
                flight.index[edge_type].append(places)
        return flight

    # --- rows ---------------------------------------------------------------------------------------------------

    def fetch_begin(self, kind: Type, names: Sequence[str], ids: Tensor) -> OneTypeInFlight:
        r"""Asks for rows of attributes.

        Args:
            kind: A node type or an edge type.
            names: Of the attributes.
            ids: ``[n]`` int64 ids after renumbering, in any order and as often as you like; of edges, see
                :meth:`edge_offsets`.
        """
        return OneTypeInFlight(self.fetch_all_begin({kind: (names, ids)}), kind)

    def fetch_all_begin(self, wanted: Mapping[Type, tuple[Sequence[str], Tensor]]) -> RowsInFlight:
        r"""As :meth:`fetch_begin` for several types, with one message to each part.

        Args:
            wanted: For each type the names of attributes and the ids.
        """
        return self._fetch(wanted, use_cache=True)

    def fetch(self, kind: Type, names: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
        r"""As :meth:`fetch_begin`, waiting at once."""
        return self.fetch_begin(kind, names, ids).wait()

    def node_rows(self, node_type: str, name: str, ids: Tensor) -> Tensor:
        r"""Rows of one node attribute."""
        return self.fetch(node_type, [name], ids)[name]

    def edge_rows(self, edge_type: EdgeType, name: str, ids: Tensor) -> Tensor:
        r"""Rows of one edge attribute, by ids after renumbering."""
        return self.fetch(edge_type, [name], ids)[name]

    def put(self, kind: Type, name: str, ids: Tensor, rows: Tensor) -> None:
        r"""Changes rows at their owners, in memory; of equal ids the last one stays. Nobody keeps copies of that
        attribute from then on.

        Args:
            kind: A node type or an edge type.
            name: Of the attribute.
            ids: ``[n]`` int64 ids after renumbering.
            rows: ``[n, *]``, as the attribute is.
        """
        column = column_of(self.share, kind, name)
        if rows.dtype != column.dtype or rows.shape != (ids.numel(), *column.shape[1:]):
            raise GraphError(
                f"attribute {name!r}: expected rows of {column.dtype} and shape {[ids.numel(), *column.shape[1:]]}, "
                f"found {rows.dtype} of shape {list(rows.shape)}"
            )
        what = {"type": kind if isinstance(kind, str) else list(kind), "name": name}
        pieces = self._split(kind, ids).pieces(self.part_id)
        step = max(_PUT_BYTES // max(rows[:1].nbytes, 1), 1)
        asked: list[InFlight] = []
        for part in range(self.num_parts):
            if part not in pieces:
                asked += self.transport.begin_all(part, "forget", {}, what)
                continue
            places, local = pieces[part]
            for low in range(0, places.numel(), step):
                chunk = slice(low, low + step)
                tensors = {"rows": local[chunk], "values": rows[places[chunk]]}
                asked += self.transport.begin_all(part, "put", tensors, what)
        for flight in asked:
            flight.wait()

    def ids_of(self, kind: Type, raw_ids: Tensor) -> Tensor:
        r"""The ids of raw ids ``[n]`` int64; raises :class:`~partpar.errors.IdError` for one that is nobody's."""
        if self.num_parts == 1 and "raw_ids" not in frame_of(self.share, kind):
            self._split(kind, raw_ids)  # checks them
            return raw_ids
        return self._directory.find(kind, raw_ids)

    def raw_ids_of(self, kind: Type, ids: Tensor) -> Tensor:
        r"""The raw ids of ids ``[n]`` int64."""
        if self.num_parts == 1 and "raw_ids" not in frame_of(self.share, kind):
            return ids
        return self.fetch(kind, ["raw_ids"], ids)["raw_ids"]

    def ping(self, part: int) -> float:
        r"""Seconds until a part answers."""
        start = time.perf_counter()
        self.transport.begin(part, "ping", {}).wait()
        return time.perf_counter() - start

    def cache_report(self) -> dict[tuple[str, str], dict[str, float]]:
        r"""What is kept of other parts' rows, and how often it was of use."""
        return self.cache.report()

    def register(self, verb: str, handler: Handler) -> None:
        r"""Adds a verb that other parts may ask of this one: ``handler(tensors, values) -> tensors``. Every rank adds
        it before any asks."""
        self.owner.verbs.register(verb, handler)

    def begin(
        self, part: int, verb: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None
    ) -> InFlight:
        r"""Asks a part, which may be this one."""
        return self.transport.begin(part, verb, tensors, values)

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        r"""Ends the service: waits, in bounded time, until no rank has a question any more. May be called again."""
        if not self._closed:
            self._closed = True
            self._directory.close()
            self.owner.close(self._timeout)
            self.transport.close()

    @property
    def closed(self) -> bool:
        r"""Whether :meth:`close` was called."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.transport.abandon()
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------

    def _starts(self, kind: Type) -> Tensor:
        return self.offsets(kind) if isinstance(kind, str) else self.edge_offsets(kind)

    def _split(self, kind: Type, ids: Tensor) -> Split:
        offsets = self._starts(kind)
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise IdError(f"expected ids of {kind!r} as int64 [n], found {ids.dtype} of shape {list(ids.shape)}")
        order, local = torch.empty_like(ids), torch.empty_like(ids)
        counts = torch.empty(self.num_parts, dtype=torch.int64)
        wrong = place_ids(
            ids.numpy(), offsets.numpy(), self.part_id, order.numpy(), local.numpy(), counts.numpy()
        )
        if wrong >= 0:
            raise IdError(
                f"expected ids of {kind!r} from 0 to {int(offsets[-1]) - 1}, found {int(ids[wrong])} at position {wrong}"
            )
        return Split(order, local, counts)

    def _fetch(
        self, wanted: Mapping[Type, tuple[Sequence[str], Tensor]], use_cache: bool
    ) -> RowsInFlight:
        flight = RowsInFlight({})
        asked: dict[int, list[tuple[Type, Tensor, Tensor]]] = {}
        own: list[tuple[Type, Tensor, Tensor]] = []
        for kind, (names, ids) in wanted.items():
            columns = {name: column_of(self.share, kind, name) for name in names}
            flight.out[kind] = {
                n: self._buffers.empty((ids.numel(), *c.shape[1:]), c.dtype) for n, c in columns.items()
            }
            split = self._split(kind, ids)
            if use_cache and isinstance(kind, str) and int(split.counts.sum() - split.counts[self.part_id]):
                split = self._take_kept(kind, names, ids, split, flight.out[kind])
            for part, (places, rows) in split.pieces(self.part_id).items():
                (own if part == self.part_id else asked.setdefault(part, [])).append((kind, places, rows))
        for part, pieces in asked.items():
            question = [[k if isinstance(k, str) else list(k), list(wanted[k][0])] for k, _, _ in pieces]
            tensors = {str(k): rows for k, (_, _, rows) in enumerate(pieces)}
            answer = self.transport.begin(part, "fetch", tensors, {"wanted": question})
            flight.asked.append((answer, [(kind, places) for kind, places, _ in pieces]))
        for kind, places, rows in own:
            for name, out in flight.out[kind].items():
                take(column_of(self.share, kind, name), rows, out, places)
        return flight

    def _take_kept(
        self, kind: str, names: Sequence[str], ids: Tensor, split: Split, out: dict[str, Tensor]
    ) -> Split:
        """Fills in what is kept here, if all of the attributes are, and returns what is left."""
        kept = {name: self.cache.get(kind, name, self._bring(kind, name)) for name in names}
        if not kept or any(k is None or k.rows.size(0) == 0 for k in kept.values()):
            return split
        least = min((k for k in kept.values() if k is not None), key=lambda k: k.rows.size(0))
        own = int(split.counts[self.part_id])
        slots, places = least.split(ids, split.order, split.local, split.counts, self.part_id)
        for name, k in kept.items():
            assert k is not None
            take(k.rows, slots, out[name], places)
            if k is not least:
                k.hits, k.misses = k.hits + slots.numel(), k.misses + ids.numel() - own - slots.numel()
        left = int(split.counts.sum()) - own
        ends = split.order.numel() - own
        return Split(
            torch.cat([split.order[:left], split.order[ends:]]),
            torch.cat([split.local[:left], split.local[ends:]]),
            split.counts,
        )

    def _bring(self, kind: str, name: str) -> Any:
        return lambda ids: self._fetch({kind: ([name], ids)}, use_cache=False).wait()[kind][name]
