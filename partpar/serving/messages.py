r"""One hop of neighbour sampling, as a question to the part that owns the destinations, and its answer.

An edge lives with its destination, so whoever owns a node can draw its in-neighbours alone. Both messages are flat:
:meth:`to_wire` splits them into tensors and plain values, :meth:`from_wire` puts them together again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from partpar.errors import SamplingError
from partpar.graph import EdgeType
from partpar.kernels.ragged import interleave

Wire = tuple[dict[str, Tensor], dict[str, Any]]

STRATEGIES = ("uniform", "last")

# What a field may be, by its annotation.
_FITS: dict[str, Callable[[Any], bool]] = {
    "Tensor": lambda value: isinstance(value, Tensor),
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: isinstance(value, str),
    "EdgeType": lambda value: (
        isinstance(value, tuple) and len(value) == 3 and all(isinstance(name, str) for name in value)
    ),
}


class _Message:
    r"""A dataclass of tensors, plain values and :obj:`None`."""

    def to_wire(self) -> Wire:
        r"""``(tensors by name, plain values by name)``; what is :obj:`None` is in neither."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value
            elif value is not None:
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return tensors, values

    @classmethod
    def from_wire(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Self:
        r"""Back from :meth:`to_wire`; raises :class:`~partpar.errors.SamplingError` for names and values that do not
        fit: they may come from a stranger."""
        if not isinstance(values, Mapping):
            raise SamplingError(f"{cls.__name__}: expected plain values by name, found {type(values).__name__}")
        known = {field.name: str(field.type) for field in fields(cls)}  # type: ignore[arg-type]
        strange = (set(tensors) | set(values)) - set(known)
        if strange:
            raise SamplingError(
                f"{cls.__name__}: expected fields among {sorted(known)}, found {sorted(map(str, strange))}; "
                f"run the same version of partpar on all workers"
            )
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            read = cls(**tensors, **plain)
        except TypeError as error:  # a field without default is missing
            raise SamplingError(f"{cls.__name__}: expected all of its fields, found: {error}") from error
        for name, annotation in known.items():
            kind, _, optional = annotation.partition(" | ")
            value = getattr(read, name)
            if not (_FITS[kind](value) or (optional and value is None)):
                raise SamplingError(f"{cls.__name__}: expected {name} to be {annotation}, found {type(value).__name__}")
        read._check()
        return read

    def _check(self) -> None:
        r"""Raises :class:`~partpar.errors.SamplingError` for fields that do not fit each other."""


@dataclass(frozen=True)
class HopRequest(_Message):
    r"""Which in-neighbours to draw for some destinations of one edge type.

    Args:
        edge_type: Whose edges.
        ids: ``[n]`` int64, the ids (after renumbering) of the destinations, all owned by the part that is asked; one
            may stand there several times.
        fanout: How many neighbours of each to draw at most; -1 for all of them.
        key: 64 bits made of seed, epoch, batch number, hop and relation: what all draws of this request have in
            common. Each row adds the raw id of its destination, which its owner knows.
        replace: Draw with replacement.
        weight_attr: Name of an edge attribute ``[E]`` that the chance of an edge is proportional to.
        time_attr: Name of a node attribute (time of the neighbour) or edge attribute. Where the edge type has neither,
            time does not restrict it.
        temporal_strategy: ``"uniform"``, or ``"last"``: draw among the latest :obj:`fanout` only.
        times: ``[n]`` int64, for each row the latest time that a neighbour may have; goes with :obj:`time_attr`.
        disjoint_ids: ``[n]`` int64, the raw id of the seed that a row is sampled for, so that trees of different seeds
            are drawn independently.
        with_edge_rows: Whether the reply says where the edges stand, which finds their attributes without a search.
    """

    edge_type: EdgeType
    ids: Tensor
    fanout: int
    key: int
    replace: bool = False
    weight_attr: str | None = None
    time_attr: str | None = None
    temporal_strategy: str = "uniform"
    times: Tensor | None = None
    disjoint_ids: Tensor | None = None
    with_edge_rows: bool = False

    def _check(self) -> None:
        if not 0 <= self.key < 2**64:
            raise SamplingError(f"HopRequest: expected a key of 64 bits, found {self.key:#x}")

    def take(self, index: Tensor) -> HopRequest:
        r"""The request for some of the rows: what one owner is asked."""
        return replace(
            self,
            ids=self.ids[index],
            times=None if self.times is None else self.times[index],
            disjoint_ids=None if self.disjoint_ids is None else self.disjoint_ids[index],
        )


@dataclass(frozen=True)
class HopReply(_Message):
    r"""The drawn in-neighbours, row after row of the request.

    Args:
        ids: ``[m]`` int64, the neighbours' ids after renumbering.
        raw_ids: ``[m]`` int64, their raw ids.
        edge_ids: ``[m]`` int64, the raw ids of the edges that lead to them.
        counts: ``[n]`` int64, how many belong to each row; they sum to ``m``.
        edge_rows: ``[m]`` int64, the ids of the edges after renumbering, if asked for: part p's follow each other in the
            order of its share, ``share.edge(type)["ids"]``.
    """

    ids: Tensor
    raw_ids: Tensor
    edge_ids: Tensor
    counts: Tensor
    edge_rows: Tensor | None = None

    def _check(self) -> None:
        columns = [*self._columns(), self.counts]
        m = self.ids.numel()
        flat = all(c.dtype == torch.int64 and c.dim() == 1 for c in columns)
        if not flat or any(c.numel() != m for c in columns[:-1]):
            raise SamplingError(
                f"HopReply: expected int64 columns of one length, found {[(c.dtype, list(c.shape)) for c in columns]}"
            )
        # Each of them as well, for a sum may overflow.
        least, most = (int(n) for n in self.counts.aminmax()) if self.counts.numel() else (0, 0)
        if least < 0 or most > m or int(self.counts.sum()) != m:
            raise SamplingError(f"HopReply: expected counts that sum to {m}, found others, from {least} to {most}")

    @classmethod
    def empty(cls, num_rows: int = 0, with_edge_rows: bool = False) -> HopReply:
        r"""No neighbours for any of the rows."""
        none = torch.empty(0, dtype=torch.int64)
        counts = torch.zeros(num_rows, dtype=torch.int64)
        return cls(none, none, none, counts, none if with_edge_rows else None)

    @classmethod
    def merge(cls, replies: Sequence[HopReply], index: Sequence[Tensor], num_rows: int) -> HopReply:
        r"""Puts the replies of several owners together in the order of the request that was split among them.

        Args:
            replies: One of each owner.
            index: The rows of the whole request that each reply answers, as given to :meth:`HopRequest.take`. Together
                they are all rows, each once.
            num_rows: Rows of the whole request.

        Raises:
            SamplingError: A reply is not one to its rows.
        """
        for reply, rows in zip(replies, index, strict=True):
            if reply.counts.numel() != rows.numel():
                raise SamplingError(
                    f"HopReply: expected neighbours of {rows.numel()} rows, found those of {reply.counts.numel()}"
                )
        if len(replies) == 1 and replies[0].counts.numel() == num_rows and index[0].numel() == num_rows:
            at = index[0]
            if num_rows < 2 or bool((at[1:] > at[:-1]).all()):  # all rows in order: nothing to move
                return replies[0]
        columns, counts = interleave(
            [reply._columns() for reply in replies], [r.counts for r in replies], index, num_rows
        )
        ids, raw_ids, edge_ids, *edge_rows = columns
        return cls(ids, raw_ids, edge_ids, counts, *edge_rows)

    def _columns(self) -> list[Tensor]:
        columns = [self.ids, self.raw_ids, self.edge_ids]
        return columns if self.edge_rows is None else [*columns, self.edge_rows]
