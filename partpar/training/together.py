r"""Small things that all workers do together: rank 0 works first, numbers of all ranks, rows of all ranks.

As in :mod:`partpar.exchange`, the group :obj:`None` stands for "alone".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import PartparError
from partpar.lost import awaiting


class FirstRankError(PartparError, RuntimeError):
    r"""What rank 0 did for all ranks failed there; the message names its error."""


# Seconds that ranks wait for rank 0: more than in ordinary collectives, which would give up on a long cut.
PATIENCE = 6 * 3600.0
_side_groups: WeakKeyDictionary[ProcessGroup, dict[str, ProcessGroup]] = WeakKeyDictionary()


def first_rank(work: Callable[[], Any], group: ProcessGroup | None = None) -> Any:
    r"""Runs :obj:`work` on rank 0 alone while the others wait, and returns its value on every rank
    (collective).

    Args:
        work: What to do, such as cutting a graph. Returns something that JSON can carry; paths become
            strings on the other ranks.
        group: The process group, such as that of a context or a route; :obj:`None` when alone.

    Raises:
        FirstRankError: On every other rank, if rank 0 raised; rank 0 raises its own error.
    """
    own = None if group is None else exchange.own_group(group)
    if own is None:
        return work()
    patient = side_group(own, "patient", PATIENCE)
    if dist.get_rank(own) > 0:
        told = _broadcast_text(None, patient)
        if "error" in told:
            raise FirstRankError(f"rank 0 failed with {told['error']}")
        return told["value"]
    try:
        value = work()
        message = {"value": json.loads(json.dumps(value, default=_as_text))}
    except BaseException as error:
        _broadcast_text({"error": f"{type(error).__name__}: {error}"}, patient)
        raise
    _broadcast_text(message, patient)
    return value


def _as_text(value: Any) -> str:
    """What JSON cannot carry by itself."""
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise TypeError(
        f"first_rank: expected a value that JSON can carry, or a path, found {type(value).__name__}; return nothing, and "
        "have every rank read what rank 0 wrote"
    )


def side_group(own: ProcessGroup, purpose: str, timeout: float) -> ProcessGroup:
    r"""A gloo group beside an own group, for those who talk at other times or wait longer (collective at the first call).

    Made once for each purpose: torch would give a second one the name, and so the stale addresses, of the first.

    Args:
        own: Of :func:`partpar.exchange.own_group`.
        purpose: What tells groups apart.
        timeout: Seconds that it waits; that of its first call stays.
    """
    known = _side_groups.setdefault(own, {})
    if purpose not in known:
        known[purpose] = dist.new_group(
            dist.get_process_group_ranks(own),
            timeout=timedelta(seconds=timeout),
            backend="gloo",
            use_local_synchronization=True,
        )
    return known[purpose]


def forget_groups() -> None:
    r"""Lets go of the groups made here and in :mod:`partpar.exchange`. Their threads would otherwise still run when the
    interpreter ends, which may abort the process."""
    _side_groups.clear()
    exchange.forget_groups()


def _broadcast_text(message: dict[str, Any] | None, group: ProcessGroup) -> dict[str, Any]:
    r"""Sends JSON from the group's rank 0: objects would travel as pickles."""
    payload = b"" if message is None else json.dumps(message).encode()
    size = torch.tensor([len(payload)])
    with awaiting(group):
        dist.broadcast(size, src=dist.get_global_rank(group, 0), group=group)
    text = (
        torch.empty(int(size), dtype=torch.uint8)
        if message is None
        else torch.tensor(list(payload), dtype=torch.uint8)
    )
    with awaiting(group):
        dist.broadcast(text, src=dist.get_global_rank(group, 0), group=group)
    told: dict[str, Any] = json.loads(bytes(text.tolist()))
    return told


def all_numbers(numbers: Sequence[float], group: ProcessGroup | None = None) -> Tensor:
    r"""Returns some numbers of every rank (collective).

    Args:
        numbers: As many on every rank.
        group: The process group, such as that of a context or a route; :obj:`None` when alone.

    Returns:
        float64 ``[world_size, len(numbers)]``, the same on every rank.
    """
    own = None if group is None else exchange.own_group(group)
    return exchange.all_gather(torch.tensor(list(numbers), dtype=torch.float64), own)


def all_rows(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    r"""Returns the rows of every rank, in rank order, on every rank (collective).

    Args:
        rows: ``[num_rows, *]``; their number may differ between ranks and be zero.
        group: The process group, such as that of a context or a route; :obj:`None` when alone.
    """
    own = None if group is None else exchange.own_group(group)
    if own is None:
        return rows
    size = exchange.rank_and_size(own)[1]
    copies = rows.repeat(size, *[1] * (rows.dim() - 1))
    return exchange.swap_rows(copies, [rows.size(0)] * size, own)[0]
