r"""What ranks tell each other before rows travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.agreement import digest
from partpar.errors import RouteError
from partpar.sharded.shard import Shard
from partpar.sharded.wanted import Wanted
from partpar.sharded.wire import away, id_blocks, send_ids

_HEADER, _FACTS = 16, 4
_HEADER_BYTES = 8 * _HEADER
MOST_TENSORS = _HEADER - _FACTS
_MOST_ROOM = 1 << 17

# For each own group the bytes of ids that a word has room for. Every rank hears what each one would have needed, so all
# come to the same number, whatever calls they are in.
_rooms: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Heard:
    r"""What all ranks told this one.

    Args:
        counts: int64 ``[num_parts, num_tensors]``, rows that each rank names to this one; 0 for itself.
        flags: int64 ``[num_parts]``
        named: Awaits the rows, rank after rank, tensor after tensor.
    """

    counts: np.ndarray
    flags: np.ndarray
    named: exchange.RowsInFlight


class Word:
    r"""Tells all ranks what this one is about to do, and hears the same of them (collective). What this rank needs
    nobody for may be done before :meth:`heard`.

    Ids travel along where there is room; room is made for a little more than was needed lately.

    Args:
        what: The call's name.
        shards: The tensors it is about.
        wanted: For each, what this rank names to every other.
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
        self._wanted, self._rank = wanted, shards[0].rank
        size = exchange.rank_and_size(group)[1]
        self._room = 0 if group is None else _rooms.get(group, 0)
        told = np.empty((size, _HEADER_BYTES + self._room), np.uint8)
        header = told[:, :_HEADER_BYTES].view(np.int64)
        header[:] = 0
        header[:, 0] = self._digest = digest(what, *(shard.label for shard in shards))
        header[:, 1], header[:, 2] = int(error is not None), flags
        header[:, _FACTS : _FACTS + len(shards)] = counts = np.stack([w.counts for w in wanted], 1)
        self.asked = away(counts, self._rank)  #: int64 ``[num_parts, num_tensors]``, rows of others that this rank names
        self._id_dtype = wanted[0].local.dtype if len({w.local.dtype for w in wanted}) == 1 else np.dtype(np.int64)
        ends = self.asked.sum(1) * self._id_dtype.itemsize + _HEADER_BYTES
        header[:, 3] = needed = int(ends.max()) - _HEADER_BYTES
        if 0 < needed <= self._room:
            for part in np.flatnonzero(self.asked.any(1)).tolist():
                ids = told[part, _HEADER_BYTES : ends[part]].view(self._id_dtype)
                np.concatenate(id_blocks(wanted, part), out=ids, casting="same_kind")
        sent, ones = torch.from_numpy(told), [1] * size
        self._flight = exchange.RowsInFlight(sent) if group is None else exchange.send_rows(sent, ones, ones, group)

    def heard(self) -> Heard:
        r"""Awaits the others.

        Raises:
            RouteError: This rank's error, or another's; on every rank.
            AgreementError: Ranks are in different calls.
        """
        told = self._flight.wait().numpy()
        header = told[:, :_HEADER_BYTES].view(np.int64)
        needed = int(header[:, 3].max())
        if self._group is not None:
            room = max(needed + needed // 8, self._room - self._room // 8) + 7 & ~7
            _rooms[self._group] = room if room <= _MOST_ROOM else 0
        if header[:, 1].any() or (header[:, 0] != self._digest).any():
            wrong = None if self._error is None else str(self._error)
            try:
                exchange.agree(self._group, self._call, {"the tensors": self._digest}, wrong)
            except RouteError:
                if self._error is not None:
                    raise self._error from None
                raise
            raise AssertionError("ranks that disagreed agree")
        counts = away(header[:, _FACTS : _FACTS + len(self._wanted)], self._rank)
        if self._group is not None and needed > self._room:
            named = send_ids(self._wanted, self._id_dtype, self.asked, counts, self._group)
        else:
            ends = counts.sum(1) * self._id_dtype.itemsize + _HEADER_BYTES
            blocks = [row[_HEADER_BYTES:end].view(self._id_dtype) for row, end in zip(told, ends, strict=True)]
            named = exchange.RowsInFlight(torch.from_numpy(np.concatenate(blocks)))
        return Heard(counts, header[:, 2].copy(), named)
