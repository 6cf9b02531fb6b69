r"""From raw ids to ids, by a directory that is spread over the parts.

Part ``hash(raw id) % num_parts`` keeps the id of a raw id (after the distributed directories of Zoltan, Devine et al.,
2002), so nobody keeps all. A part makes its table of a type when it is first asked, from what all parts tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from partpar.directory import home_of
from partpar.errors import IdError
from partpar.graph import GraphData
from partpar.serving.later import MadeOnce, Patient, later
from partpar.serving.owner import Type, column_of, frame_of
from partpar.serving.transport import Tensors, Transport, Values, Verbs

Table = tuple[Tensor, Tensor]  # raw ids, rising, and their ids


class Directory:
    r"""One part's piece of the directory, and the way to the others'.

    Args:
        share: Whose rows this part tells of.
        offsets: Says where the ids of each part begin, for a type.
        transport: To ask other parts.
        verbs: To be asked.
        timeout: Seconds until tables must be there.
    """

    def __init__(
        self,
        share: GraphData,
        offsets: Callable[[Type], Tensor],
        transport: Transport,
        verbs: Verbs,
        timeout: float,
    ) -> None:
        self.offsets = offsets
        self.share, self.num_parts, self.transport, self.timeout = share, share.num_parts, transport, timeout
        self._tables = MadeOnce(self._make)
        verbs.register("find", self._answer_find)
        verbs.register("entries", self._answer_entries)

    def find(self, kind: Type, raw_ids: Tensor) -> Tensor:
        r"""The ids of raw ids ``[n]`` int64, in order.

        Raises:
            IdError: No node or edge of this type has such a raw id; the message names the first.
        """
        out = torch.full_like(raw_ids, -1)
        homes = home_of(raw_ids, self.num_parts)
        by_home = homes.argsort(stable=True).split(torch.bincount(homes, minlength=self.num_parts).tolist())
        asked = [
            (at, Patient(self.transport, part, "find", {"raw_ids": raw_ids[at]}, {"type": _plain(kind)}, self.timeout))
            for part, at in enumerate(by_home)
            if at.numel()
        ]
        for at, flight in asked:
            out[at] = flight.wait()["ids"]
        wrong = (out < 0).nonzero()
        if wrong.numel():
            raise IdError(
                f"expected raw ids of {kind!r}, found {wrong.numel()} that no part has, the first {int(raw_ids[wrong[0]])}"
            )
        return out

    def close(self) -> None:
        r"""Waits for tables that are being made."""
        self._tables.close(self.timeout)

    def _answer_find(self, tensors: Tensors, values: Values) -> Tensors:
        kind = _kind(values["type"])
        frame_of(self.share, kind)  # raises for an unknown type
        table = self._tables.get(kind)
        if table is None:
            return later()
        known, ids = table
        raw_ids = tensors["raw_ids"]
        if known.numel() == 0:
            return {"ids": torch.full_like(raw_ids, -1)}
        at = torch.searchsorted(known, raw_ids).clamp_(max=known.numel() - 1)
        return {"ids": torch.where(known[at] == raw_ids, ids[at], -1)}

    def _answer_entries(self, tensors: Tensors, values: Values) -> Tensors:
        kind, home = _kind(values["type"]), int(values["home"])
        raw_ids = column_of(self.share, kind, "raw_ids")
        rows = (home_of(raw_ids, self.num_parts) == home).nonzero().flatten()
        return {"raw_ids": raw_ids[rows], "rows": rows}

    def _make(self, kind: Type) -> Table:
        question = {"type": _plain(kind), "home": self.share.part_id}
        asked = [self.transport.begin(p, "entries", {}, question) for p in range(self.num_parts)]
        told = [flight.wait() for flight in asked]
        starts = self.offsets(kind).tolist()
        raw_ids, order = torch.cat([t["raw_ids"] for t in told]).sort()
        return raw_ids, torch.cat([t["rows"] + start for t, start in zip(told, starts, strict=False)])[order]


def _plain(kind: Type) -> str | list[str]:
    return kind if isinstance(kind, str) else list(kind)


def _kind(plain: str | Sequence[str]) -> Type:
    return plain if isinstance(plain, str) else tuple(plain)  # type: ignore[return-value]
