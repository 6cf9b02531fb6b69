r"""Rows by id between workers that all call at once: fetched (:func:`pull`) or brought to their owners (:func:`push`).

A call is three exchanges: a header of fixed size, ids, rows. The header tells every rank what every other is about to
do, how many rows it will ask for, and whether it found something wrong, so that ranks which disagree, or of which one
cannot go on, all raise before anything is sent that the other side would not expect. Rows of several tensors travel in
one exchange, as bytes. A worker's own rows do not travel.
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
from partpar.kernels.table import fetch_rows, place_ids, word_of, words
from partpar.sharded.shard import Shard, digest

_HEADER, _FACTS = 16, 3
MOST_TENSORS = _HEADER - _FACTS
_ALIGN = 8  # bytes; rows of every dtype may begin at a multiple of it
_MOST_BUFFERS = 8


# --- buffers ---------------------------------------------------------------------------------------------------------

_free: list[Tensor] = []


def _take(num_bytes: int) -> Tensor:
    """uint8 ``[num_bytes]``, of memory that was used before where there is some: fresh pages halve gloo's speed."""
    for i, buffer in enumerate(_free):
        if buffer.numel() >= num_bytes:
            return _free.pop(i)[:num_bytes]
    return torch.empty(max(num_bytes + num_bytes // 4, 1 << 16), dtype=torch.uint8)[:num_bytes]


def _give(buffer: Tensor) -> None:
    whole = buffer.untyped_storage().nbytes()
    _free.append(torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage(), 0, (whole,)))  # type: ignore[call-overload]
    if len(_free) > _MOST_BUFFERS:
        _free.pop(0)


_count_up = np.arange(1 << 14)


def _in_order(num: int) -> np.ndarray:
    """``0, 1, …, num - 1``, not made anew each time."""
    global _count_up
    if len(_count_up) < num:
        _count_up = np.arange(2 * num)
    return _count_up[:num]


# --- who is asked for what -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    r"""Ids by owner: those of other ranks in rank order, then this rank's own.

    Args:
        order: ``[n]``, the place of each among the ids given.
        local: ``[n]``, its row at the owner.
        counts: int64 ``[num_parts]``.
    """

    order: np.ndarray
    local: np.ndarray
    counts: np.ndarray
    rank: int

    @property
    def num_away(self) -> int:
        return len(self.order) - int(self.counts[self.rank])

    def block(self, part: int) -> slice:
        r"""Where the ids of a part are."""
        if part == self.rank:
            return slice(self.num_away, len(self.order))
        start = int(self.counts[:part].sum()) - (int(self.counts[self.rank]) if self.rank < part else 0)
        return slice(start, start + int(self.counts[part]))


def want(shard: Shard, ids: Tensor) -> Wanted:
    r"""Finds the owners of ids.

    Raises:
        IdError: With the first id that nobody owns.
    """
    given = ids.numpy()
    order, local = np.empty(len(given), np.int64), np.empty(len(given), shard.id_dtype)
    counts = np.empty(shard.policy.num_parts, np.int64)
    wrong = place_ids(given, shard.offsets, shard.rank, order, local, counts)
    if wrong >= 0:
        raise IdError(
            f"{shard.name}: expected ids from 0 to {shard.policy.num_rows - 1}, found {int(given[wrong])} at place {wrong}"
        )
    return Wanted(order, local, counts, shard.rank)


def _nothing(shard: Shard) -> Wanted:
    empty = np.empty(0, np.int64)
    return Wanted(empty, empty.astype(shard.id_dtype), np.zeros(shard.policy.num_parts, np.int64), shard.rank)


class Word:
    r"""Tells all ranks what this one is about to do, and hears the same of them (collective). What this rank needs
    nobody for may be done before :meth:`heard`.

    Args:
        what: The call's name.
        shards: The tensors it is about.
        wanted: For each, what this rank will name to every other.
        group: An own group.
        error: What this rank found wrong.
        flags: A number for every rank.
    """

    def __init__(
        self,
        what: str,
        shards: Sequence[Shard],
        wanted: Sequence[Wanted],
        group: ProcessGroup | None,
        error: RouteError | None,
        flags: int = 0,
    ) -> None:
        if group is None and error is not None:
            raise error
        self._call, self._group, self._error = f"{what} of {', '.join(shard.name for shard in shards)}", group, error
        self._size = exchange.rank_and_size(group)[1]
        header = np.zeros((self._size, _HEADER), np.int64)
        header[:, 0] = self._digest = digest(what, *(shard.label for shard in shards))
        header[:, 1], header[:, 2] = int(error is not None), flags
        self._fields = slice(_FACTS, _FACTS + len(shards))
        header[:, self._fields] = np.stack([w.counts for w in wanted], 1)
        ones = [1] * self._size
        told = torch.from_numpy(header)
        self._flight = (
            exchange.RowsInFlight(told) if group is None else exchange.send_rows(told, ones, ones, group)
        )

    def heard(self) -> tuple[np.ndarray, np.ndarray]:
        r"""int64 ``[num_parts, num_tensors]``, the rows that each rank will name to this one, and each rank's flags.

        Raises:
            RouteError: This rank's error, or another's; on every rank.
            AgreementError: Ranks are in different calls.
        """
        heard = self._flight.wait().numpy()
        if heard[:, 1].any() or (heard[:, 0] != self._digest).any():
            wrong = None if self._error is None else str(self._error)
            try:
                exchange.agree(self._group, self._call, {"the tensors": self._digest}, wrong)
            except RouteError:
                if self._error is not None:
                    raise self._error from None
                raise
            raise AssertionError("ranks that disagreed agree")
        return heard[:, self._fields].copy(), heard[:, 2].copy()


# --- layouts on the wire ---------------------------------------------------------------------------------------------


def _starts(counts: np.ndarray, shards: Sequence[Shard]) -> tuple[np.ndarray, list[int]]:
    """Where the block of each (rank, tensor) begins in a buffer of rows, and the bytes of each rank's blocks."""
    sizes = counts * np.array([shard.row_bytes for shard in shards])
    sizes = (sizes + _ALIGN - 1) // _ALIGN * _ALIGN
    ends = sizes.cumsum().reshape(sizes.shape)
    return ends - sizes, sizes.sum(1).tolist()


def _block(buffer: np.ndarray, start: int, num_rows: int, row_bytes: int, dtype: type | np.dtype) -> np.ndarray:
    """A block of rows in a buffer of bytes, ``[num_rows, k]``."""
    found = buffer[start : start + num_rows * row_bytes].view(dtype)
    return found.reshape(num_rows, row_bytes // np.dtype(dtype).itemsize)


def _away(counts: np.ndarray, rank: int) -> np.ndarray:
    """Counts of what travels."""
    counts = counts.copy()
    counts[rank] = 0
    return counts


def _send_ids(
    wanted: Sequence[Wanted], asked: np.ndarray, heard: np.ndarray, group: ProcessGroup
) -> exchange.RowsInFlight:
    size, dtype = len(asked), wanted[0].local.dtype if len({w.local.dtype for w in wanted}) == 1 else np.int64
    if len(wanted) == 1:
        ids = wanted[0].local[: wanted[0].num_away]
    else:
        blocks = [w.local[w.block(part)] for part in range(size) if asked[part].any() for w in wanted]
        ids = np.concatenate([np.empty(0, dtype), *blocks]).astype(dtype, copy=False)
    return exchange.send_rows(torch.from_numpy(ids), asked.sum(1).tolist(), heard.sum(1).tolist(), group)


# --- fetching --------------------------------------------------------------------------------------------------------


class RowsOnTheWay:
    r"""Rows that were asked for; :meth:`wait` returns them."""

    def __init__(
        self, out: list[Tensor], shards: Sequence[Shard], wanted: Sequence[Wanted], asked: np.ndarray
    ) -> None:
        self._out, self._shards, self._wanted, self._asked = out, shards, wanted, asked
        self._flight: exchange.RowsInFlight | None = None
        self._buffers: tuple[Tensor, ...] = ()

    def begin(self, flight: exchange.RowsInFlight, *buffers: Tensor) -> None:
        self._flight, self._buffers = flight, buffers

    def wait(self) -> list[Tensor]:
        r"""The rows of each tensor, in the order of the ids."""
        if self._flight is not None:
            landing = self._flight.wait().numpy()
            starts, _ = _starts(self._asked, self._shards)
            for i, (shard, wanted) in enumerate(zip(self._shards, self._wanted, strict=True)):
                word, into = word_of(shard.row_bytes), words(self._out[i])
                for part in np.flatnonzero(self._asked[:, i]).tolist():
                    num = int(self._asked[part, i])
                    rows = _block(landing, int(starts[part, i]), num, shard.row_bytes, word)
                    fetch_rows(rows, _in_order(num), into, wanted.order[wanted.block(part)])
            for buffer in self._buffers:
                _give(buffer)
            self._flight, self._buffers = None, ()
        return self._out


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
    wanted: list[Wanted] = []
    try:
        wanted = [want(*pair) for pair in zip(shards, ids, strict=True)] if error is None else []
    except IdError as found:
        error = found
    if error is not None:
        wanted = [_nothing(shard) for shard in shards]
    word = Word(what, shards, wanted, group, error)
    rank = shards[0].rank
    asked = _away(np.stack([w.counts for w in wanted], 1), rank)
    out = [
        torch.empty((len(w.order), *s.rows.shape[1:]), dtype=s.rows.dtype) for s, w in zip(shards, wanted, strict=True)
    ]
    for shard, w, rows in zip(shards, wanted, out, strict=True):
        own = w.block(rank)
        fetch_rows(shard.words, w.local[own], words(rows), w.order[own])
    heard = _away(word.heard()[0], rank)
    way = RowsOnTheWay(out, shards, wanted, asked)
    if group is not None:
        named = _send_ids(wanted, asked, heard, group).wait().numpy()
        starts, send_bytes = _starts(heard, shards)
        sent = _take(sum(send_bytes))
        begin, buffer = 0, sent.numpy()
        for part in range(len(heard)):
            for i, shard in enumerate(shards):
                num = int(heard[part, i])
                if num:
                    into = _block(buffer, int(starts[part, i]), num, shard.row_bytes, word_of(shard.row_bytes))
                    wrong = fetch_rows(shard.words, named[begin : begin + num], into, _in_order(num))
                    assert wrong < 0, f"rank {part} named a row that is not here"
                    begin += num
        recv_bytes = _starts(asked, shards)[1]
        landing = _take(sum(recv_bytes))
        way.begin(exchange.send_rows(sent, send_bytes, recv_bytes, group, landing), sent, landing)
    return way


# --- bringing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brought:
    r"""Rows that ranks brought for one tensor: ``values[at[i]]`` is for row ``rows[i]`` of this worker."""

    rows: np.ndarray
    values: np.ndarray
    at: np.ndarray


class Arrived:
    r"""What all ranks brought."""

    def __init__(self, brought: list[list[Brought]], flags: np.ndarray, buffers: tuple[Tensor, ...]) -> None:
        self._brought, self.flags, self._buffers = brought, flags, buffers

    def of(self, tensor: int) -> Iterator[Brought]:
        r"""For one tensor, rank after rank: within a rank, in the order in which it named ids. So sums do not depend on
        which worker brought what, as long as all workers' ids, one after the other, are the same."""
        return iter(self._brought[tensor])

    def done(self) -> None:
        r"""Values are not needed any more."""
        for buffer in self._buffers:
            _give(buffer)
        self._buffers = ()


def push(
    what: str,
    shards: Sequence[Shard],
    ids: Sequence[Tensor],
    values: Sequence[Tensor],
    group: ProcessGroup | None,
    error: RouteError | None = None,
    flags: int = 0,
    numbers: bool = False,
) -> Arrived:
    r"""Brings rows to their owners (collective).

    Args:
        what, shards, ids, group, error: As for :func:`pull`.
        values: For each, ``[n, *]`` contiguous, in the tensor's dtype.
        flags: A number that every rank is told.
        numbers: Whether values are to be summed; otherwise they arrive as words.
    """
    wanted: list[Wanted] = []
    try:
        wanted = [want(*pair) for pair in zip(shards, ids, strict=True)] if error is None else []
    except IdError as found:
        error = found
    if error is not None:
        wanted = [_nothing(shard) for shard in shards]
    word = Word(what, shards, wanted, group, error, flags)
    rank, landing, named = shards[0].rank, None, np.empty(0, np.int64)
    asked = _away(np.stack([w.counts for w in wanted], 1), rank)
    starts, send_bytes = _starts(asked, shards)
    sent = _take(sum(send_bytes))
    buffer = sent.numpy()
    for i, (shard, w) in enumerate(zip(shards, wanted, strict=True)):
        rows = words(values[i])
        for part in np.flatnonzero(asked[:, i]).tolist():
            num = int(asked[part, i])
            into = _block(buffer, int(starts[part, i]), num, shard.row_bytes, word_of(shard.row_bytes))
            fetch_rows(rows, w.order[w.block(part)], into, _in_order(num))
    heard, all_flags = word.heard()
    heard = _away(heard, rank)
    if group is not None:
        flight = _send_ids(wanted, asked, heard, group)
        starts, recv_bytes = _starts(heard, shards)
        landing = _take(sum(recv_bytes))
        carried = exchange.send_rows(sent, send_bytes, recv_bytes, group, landing)
        named = flight.wait().numpy()
        carried.wait()
    brought: list[list[Brought]] = [[] for _ in shards]
    begin = 0
    for part in range(len(heard)):
        for i, shard in enumerate(shards):
            kind = shard.rows.numpy().dtype if numbers else word_of(shard.row_bytes)
            if part == rank:
                own, rows = wanted[i].block(rank), values[i]
                typed = rows.view(rows.size(0), rows.shape[1:].numel()).numpy() if numbers else words(rows)
                brought[i].append(Brought(wanted[i].local[own], typed, wanted[i].order[own]))
            elif num := int(heard[part, i]):
                assert landing is not None
                typed = _block(landing.numpy(), int(starts[part, i]), num, shard.row_bytes, kind)
                brought[i].append(Brought(named[begin : begin + num], typed, _in_order(num)))
                begin += num
    buffers = (sent,) if landing is None else (sent, landing)
    return Arrived(brought, all_flags, buffers)
