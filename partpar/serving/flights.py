r"""Requests split by owner, and what is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partpar.errors import AgreementError
from partpar.graph import EdgeType
from partpar.serving.messages import HopReply, HopRequest
from partpar.serving.owner import Type, take
from partpar.serving.transport import InFlight, below


@dataclass(frozen=True)
class Split:
    r"""A request sorted by owner.

    Args:
        order: Place in the request of each sorted id, this part's own last.
        local: The row of each at its owner.
        counts: How many each owner has.
    """

    order: Tensor
    local: Tensor
    counts: Tensor

    def pieces(self, own: int) -> dict[int, tuple[Tensor, Tensor]]:
        r"""Places and rows of each part that owns any."""
        parts = [p for p in range(self.counts.numel()) if p != own] + [own]
        sizes = [int(self.counts[p]) for p in parts]
        split = zip(parts, self.order.split(sizes), self.local.split(sizes), strict=True)
        return {part: (order, local) for part, order, local in split if order.numel()}


@dataclass
class HopsInFlight:
    r"""Hops that were begun; :meth:`wait` returns the replies by edge type, in the order of the requests."""

    requests: Mapping[EdgeType, HopRequest]
    index: dict[EdgeType, list[Tensor]]
    replies: dict[EdgeType, list[HopReply]]
    asked: list[tuple[InFlight, list[EdgeType]]] = field(default_factory=list)

    def wait(self) -> dict[EdgeType, HopReply]:
        for flight, edge_types in self.asked:
            answer = flight.wait()
            for k, edge_type in enumerate(edge_types):
                self.replies[edge_type].append(HopReply.from_wire(below(answer, k), {}))
        self.asked = []
        return {
            t: HopReply.merge(self.replies[t], self.index[t], request.ids.numel())
            if self.index[t]
            else HopReply.empty(with_edge_rows=request.with_edge_rows)
            for t, request in self.requests.items()
        }


@dataclass
class RowsInFlight:
    r"""Rows that were asked for; :meth:`wait` returns ``{type: {name: rows}}``, in the order of the ids."""

    out: dict[Type, dict[str, Tensor]]
    asked: list[tuple[InFlight, list[tuple[Type, Tensor]]]] = field(default_factory=list)

    def wait(self) -> dict[Type, dict[str, Tensor]]:
        for flight, pieces in self.asked:
            answer = flight.wait()
            for k, (kind, places) in enumerate(pieces):
                for name, out in self.out[kind].items():
                    rows = answer[f"{k}/{name}"]
                    if rows.dtype != out.dtype or rows.shape != (places.numel(), *out.shape[1:]):
                        raise AgreementError(
                            f"attribute {name!r} of {kind!r}: expected {out.dtype} of shape {[places.numel(), *out.shape[1:]]} "
                            f"from another part, found {rows.dtype} of shape {list(rows.shape)}"
                        )
                    take(rows, torch.arange(places.numel()), out, places)
        self.asked = []
        return self.out


@dataclass
class OneTypeInFlight:
    r"""As :class:`RowsInFlight`, for one type: ``{name: rows}``."""

    rows: RowsInFlight
    kind: Type

    def wait(self) -> dict[str, Tensor]:
        return self.rows.wait()[self.kind]
