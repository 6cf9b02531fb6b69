r"""Rows by id between workers that all call at once: fetched (:func:`pull`) or brought to their owners (:func:`push`).

A call is two exchanges: a word and rows. The word tells every rank what every other is about to do, which rows it names,
and whether it found something wrong, so that ranks which disagree, or of which one cannot go on, all raise before
anything is sent that the other side would not expect. Ids that it has no room for follow by themselves. Rows of several
tensors travel in one exchange, as bytes. A worker's own rows do not travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import IdError, RouteError
from partpar.kernels.whole_rows import fetch_rows, whole
from partpar.sharded.shard import Shard
from partpar.sharded.wanted import Wanted, nothing, want
from partpar.sharded.wire import block, give, starts_of, take
from partpar.sharded.word import MOST_TENSORS, Word

__all__ = ["MOST_TENSORS", "Arrived", "Brought", "RowsOnTheWay", "find", "pull", "push"]


class RowsOnTheWay:
    r"""Rows that were asked for; :meth:`wait` returns them."""

    def __init__(
        self, out: list[Tensor], shards: Sequence[Shard], wanted: Sequence[Wanted], asked: np.ndarray
    ) -> None:
        self._out, self._shards, self._wanted, self._asked = out, shards, wanted, asked
        self._flight: exchange.RowsInFlight | None = None
        self._buffers: tuple[Tensor, ...] = ()

    @property
    def wanted(self) -> Sequence[Wanted]:
        r"""Of each tensor, to bring rows back the same way."""
        return self._wanted

    def begin(self, flight: exchange.RowsInFlight, *buffers: Tensor) -> None:
        self._flight, self._buffers = flight, buffers

    def wait(self) -> list[Tensor]:
        r"""The rows of each tensor, in the order of the ids."""
        if self._flight is not None:
            landing = self._flight.wait().numpy()
            starts, _ = starts_of(self._asked, self._shards)
            for i, (shard, wanted) in enumerate(zip(self._shards, self._wanted, strict=True)):
                into = whole(self._out[i])
                for part in np.flatnonzero(self._asked[:, i]).tolist():
                    num = int(self._asked[part, i])
                    rows = block(landing, int(starts[part, i]), num, shard.row_bytes)
                    into[wanted.order[wanted.block(part)]] = rows
            for buffer in self._buffers:
                give(buffer)
            self._flight, self._buffers = None, ()
        return self._out


def find(
    shards: Sequence[Shard], ids: Sequence[Tensor], error: RouteError | None
) -> tuple[list[Wanted], RouteError | None]:
    r"""The owners of ids, or of none where something is wrong with them."""
    try:
        if error is None:
            return [want(*pair) for pair in zip(shards, ids, strict=True)], None
    except IdError as found:
        error = found
    return [nothing(shard) for shard in shards], error


def pull(
    what: str,
    shards: Sequence[Shard],
    ids: Sequence[Tensor],
    group: ProcessGroup | None,
    error: RouteError | None = None,
) -> RowsOnTheWay:
    r"""Begins fetching rows (collective).

    Args:
        what: The call's name, for messages.
        shards: At most :data:`MOST_TENSORS`, the same on every rank.
        ids: For each, ``[n]`` int64, any ids, repeated or not.
        group: An own group.
        error: What this rank found wrong already; all ranks raise.

    Raises:
        IdError: On the rank whose ids are out of range; all others raise a :class:`RouteError` that names it.
    """
    wanted, error = find(shards, ids, error)
    word = Word(what, shards, wanted, group, error)
    rank, asked = shards[0].rank, word.asked
    out = [
        torch.empty((len(w.order), *s.rows.shape[1:]), dtype=s.rows.dtype) for s, w in zip(shards, wanted, strict=True)
    ]
    for shard, w, rows in zip(shards, wanted, out, strict=True):
        own = w.block(rank)
        fetch_rows(shard.whole, w.local[own], whole(rows), w.order[own])
    told = word.heard()
    heard = told.counts
    way = RowsOnTheWay(out, shards, wanted, asked)
    if group is not None:
        named = told.named.wait().numpy()
        starts, send_bytes = starts_of(heard, shards)
        sent = take(sum(send_bytes))
        begin, buffer = 0, sent.numpy()
        for part in range(len(heard)):
            for i, shard in enumerate(shards):
                num = int(heard[part, i])
                if num:
                    into = block(buffer, int(starts[part, i]), num, shard.row_bytes)
                    wrong = fetch_rows(shard.whole, named[begin : begin + num], into)
                    assert wrong < 0, f"rank {part} named a row that is not here"
                    begin += num
        recv_bytes = starts_of(asked, shards)[1]
        landing = take(sum(recv_bytes))
        way.begin(exchange.send_rows(sent, send_bytes, recv_bytes, group, landing), sent, landing)
    return way


# --- bringing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brought:
    r"""Whole rows that ranks brought for one tensor: ``values[at[i]]`` is for row ``rows[i]`` of this worker, or
    ``values[i]`` where :obj:`at` is :obj:`None`. Values may be on their way yet."""

    rows: np.ndarray
    values: np.ndarray
    at: np.ndarray | None
    flight: exchange.RowsInFlight | None = None

    def copy(self, out: np.ndarray) -> None:
        r"""Writes the values in the order of the rows, once they are here."""
        if self.flight is not None:
            self.flight.wait()
        if self.at is None:
            out[:] = self.values
        else:
            fetch_rows(self.values, self.at, out)


class Arrived:
    r"""What all ranks brought."""

    def __init__(
        self,
        brought: list[list[Brought]],
        flags: np.ndarray,
        flight: exchange.RowsInFlight | None,
        buffers: tuple[Tensor, ...],
    ) -> None:
        self._brought, self.flags, self._flight, self._buffers = brought, flags, flight, buffers

    def of(self, tensor: int) -> Iterator[Brought]:
        r"""For one tensor, rank after rank: within a rank, in the order in which it named ids. So sums do not depend on
        which worker brought what, as long as all workers' ids, one after the other, are the same."""
        return iter(self._brought[tensor])

    def wait(self) -> Arrived:
        r"""Awaits all values."""
        if self._flight is not None:
            self._flight.wait()
        return self

    def done(self) -> None:
        r"""Values are not needed any more."""
        self.wait()
        for buffer in self._buffers:
            give(buffer)
        self._buffers = ()


def push(
    what: str,
    shards: Sequence[Shard],
    wanted: Sequence[Wanted],
    values: Sequence[Tensor],
    group: ProcessGroup | None,
    error: RouteError | None = None,
    flags: int = 0,
) -> Arrived:
    r"""Brings rows to their owners (collective).

    Args:
        what, shards, group, error: As for :func:`pull`.
        wanted: For each, of :func:`find`.
        values: For each, ``[n, *]`` contiguous, in the tensor's dtype.
        flags: A number that every rank is told.
    """
    word = Word(what, shards, wanted, group, error, flags)
    rank, asked, landing, flight, named = shards[0].rank, word.asked, None, None, np.empty(0, np.int64)
    starts, send_bytes = starts_of(asked, shards)
    sent = take(sum(send_bytes))
    buffer = sent.numpy()
    for i, (shard, w) in enumerate(zip(shards, wanted, strict=True)):
        given = whole(values[i])
        for part in np.flatnonzero(asked[:, i]).tolist():
            num = int(asked[part, i])
            into = block(buffer, int(starts[part, i]), num, shard.row_bytes)
            fetch_rows(given, w.order[w.block(part)], into)
    told = word.heard()
    heard = told.counts
    if group is not None:
        starts, recv_bytes = starts_of(heard, shards)
        landing = take(sum(recv_bytes))
        flight = exchange.send_rows(sent, send_bytes, recv_bytes, group, landing)
        named = told.named.wait().numpy()
    brought: list[list[Brought]] = [[] for _ in shards]
    begin = 0
    for part in range(len(heard)):
        for i, shard in enumerate(shards):
            if part == rank:
                own = wanted[i].block(rank)
                brought[i].append(Brought(wanted[i].local[own], whole(values[i]), wanted[i].order[own]))
            elif num := int(heard[part, i]):
                assert landing is not None
                rows = block(landing.numpy(), int(starts[part, i]), num, shard.row_bytes)
                brought[i].append(Brought(named[begin : begin + num], rows, None, flight))
                begin += num
    buffers = (sent,) if landing is None else (sent, landing)
    return Arrived(brought, told.flags, flight, buffers)
