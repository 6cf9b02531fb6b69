r"""What ranks tell each other before rows travel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import RouteError
from partpar.sharded.shard import Shard, digest
from partpar.sharded.wanted import Wanted

_HEADER, _FACTS = 16, 3
MOST_TENSORS = _HEADER - _FACTS


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
