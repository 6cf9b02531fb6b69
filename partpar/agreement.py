r"""What ranks tell each other so that all of them do the same: before a call, and at the end of a step.

Alike must be what every rank makes of its own calls: their order, and in each the dtype and the width of rows. The first
calls are compared one by one, before anything is sent; see :class:`Checks`. Of all calls on a group every rank keeps a
running digest, which rides on the reduction of the loss (:func:`tally`, :func:`compare`) and so costs no message.
``PARTPAR_DEBUG=1`` compares every call, with the user's line that it came from.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import lost
from partpar.errors import AgreementError, RouteError
from partpar.groups import beside, wire_device

DEBUG = os.environ.get("PARTPAR_DEBUG", "0") not in ("", "0")
_CHECKED_CALLS = 64
_SEEN_KINDS = 1024
_NUM_FIELDS, _TEXT_BYTES = 16, 384
_DIGEST = 1 << 20  # so that sums of squares stay exact in float64 for a thousand ranks
_REMEMBERED = 6  # of the last calls, for messages


def digest(*facts: Any) -> int:
    r"""A number that differs where facts do, the same in every process."""
    text = "\0".join(map(str, facts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


@dataclass
class Checks:
    r"""Decides which calls are checked for agreement. It counts calls, and every rank counts the same ones, so that
    ranks that disagree about *what* they exchange still agree that they compare notes first. The first calls see
    every layer of a model forwards and backwards. Later ones are checked if they are of a kind that was not seen
    before: ranks that do the same see it at the same call. ``PARTPAR_DEBUG=1`` checks all.
    """

    calls: int = 0
    always: bool = field(default_factory=lambda: DEBUG)
    seen: set[Any] = field(default_factory=set)

    def due(self, *kind: Any) -> bool:
        r"""Whether the next call is to be checked.

        Args:
            kind: What ranks must have alike in it, such as its name, dtype and width; nothing if this rank's own input
                is wrong, and it will raise in any case.
        """
        self.calls += 1
        if kind and kind not in self.seen and len(self.seen) < _SEEN_KINDS:
            self.seen.add(kind)
            return True
        return self.always or self.calls <= _CHECKED_CALLS


def agree(
    group: ProcessGroup | None,
    what: str,
    fields: dict[str, int],
    error: str | None = None,
    kind: Callable[[str], Exception] = RouteError,
) -> list[dict[str, int]]:
    r"""Compares what each rank is about to do, before any rank does it.

    Args:
        group: An own group; alone, only :obj:`error` is looked at.
        what: The call's name, for messages.
        fields: Name and value of what must be equal on all ranks. A name that starts with ``"_"`` may differ.
        error: What this rank found wrong with its own input. All ranks then raise.
        kind: What they raise, made of what the ranks tell.

    Returns:
        The fields of every rank.

    Raises:
        RouteError, or :obj:`kind`: A rank has an error to tell; on every rank, with that message.
        AgreementError: A field differs; on every rank, with both values.
    """
    if group is None:
        if error is not None:
            raise kind(error)
        return [dict(fields)]
    assert len(fields) < _NUM_FIELDS - 1
    if DEBUG:
        what = f"{what} in {lost.where()}"
    text = (what if error is None else error).encode()[:_TEXT_BYTES]
    buffer = torch.zeros(_NUM_FIELDS * 8 + _TEXT_BYTES, dtype=torch.uint8)
    numbers = torch.tensor([int(error is not None), len(text), *fields.values()], dtype=torch.int64)
    buffer[: numbers.numel() * 8] = numbers.view(torch.uint8)
    buffer[_NUM_FIELDS * 8 : _NUM_FIELDS * 8 + len(text)] = torch.frombuffer(
        bytearray(text), dtype=torch.uint8
    )
    mine = buffer.to(wire_device(group))
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with lost.awaiting(group):
        dist.all_gather(gathered, mine, group=group)
    headers = [g.cpu() for g in gathered]

    rows = [h[: _NUM_FIELDS * 8].view(torch.int64).tolist() for h in headers]
    texts = [
        bytes(h[_NUM_FIELDS * 8 : _NUM_FIELDS * 8 + r[1]].tolist()).decode(errors="replace")
        for h, r in zip(headers, rows, strict=True)
    ]
    failed = [f"rank {rank}: {texts[rank]}" for rank, row in enumerate(rows) if row[0]]
    if failed:
        raise kind("; ".join(failed))
    for rank, other in enumerate(texts):
        if other != texts[0]:
            raise AgreementError(
                f"ranks are in different calls: rank 0 in {texts[0]}, rank {rank} in {other}; every rank must make the same calls in the same order"
            )
    told = [dict(zip(fields, row[2:], strict=False)) for row in rows]
    for name in fields:
        for rank, values in enumerate(told):
            if not name.startswith("_") and values[name] != told[0][name]:
                raise AgreementError(
                    f"{what}: ranks disagree on {name}: rank 0 has {_show(name, told[0][name])}, rank {rank} has {_show(name, values[name])}; pass the same on every rank"
                )
    return told


_DTYPES: list[torch.dtype] = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)

_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def tensor_fields(x: Tensor) -> dict[str, int]:
    r"""What two tensors must share so that their rows can be exchanged: dtype, trailing shape, and whether a backward
    pass will follow."""
    dims = {f"size of dimension {i + 1}": n for i, n in enumerate(x.shape[1:9])}
    return {
        "dtype": _CODES[x.dtype],
        "requires_grad": int(x.requires_grad),
        "number of dimensions": x.dim(),
        **dims,
    }


def _show(name: str, value: int) -> str:
    if name == "dtype":
        return str(_DTYPES[value])
    return str(bool(value)) if name == "requires_grad" else str(value)


# --- the calls of a step --------------------------------------------------------------------------------------------


class _Calls:
    """What this rank did on a group so far."""

    __slots__ = ("count", "digest", "last")

    def __init__(self) -> None:
        self.count, self.digest = 0, 0
        self.last: deque[tuple[str, torch.dtype, torch.Size]] = deque(maxlen=_REMEMBERED)


_calls: WeakKeyDictionary[ProcessGroup, _Calls] = WeakKeyDictionary()
_KINDS = {"send_rows": 1, "swap_rows": 2, "all_reduce": 3, "all_gather": 4}


def note(group: ProcessGroup, kind: str, rows: Tensor) -> None:
    r"""Keeps in mind that an exchange is about to begin; with ``PARTPAR_DEBUG=1`` compares it first (collective).

    Args:
        group: Whose ranks take part.
        kind: Of exchange.
        rows: What is sent; dtype and width must be alike on all ranks, their number need not.
    """
    shape = rows.shape if kind.startswith("all_") else rows.shape[1:]
    if DEBUG:
        agree(beside(group), f"{kind} of {str(rows.dtype).removeprefix('torch.')} {list(shape)}", {})
    calls = _calls.get(group)
    if calls is None:
        calls = _calls[group] = _Calls()
    calls.count += 1
    # Of integers alone, whose hash is the same in every process.
    calls.digest = hash((calls.digest, _KINDS[kind], _CODES[rows.dtype], shape.numel()))
    calls.last.append((kind, rows.dtype, shape))


def tally(group: ProcessGroup | None) -> list[float]:
    r"""What to add to a sum over all ranks of a group, so that :func:`compare` can tell from the sum whether all of them
    made the same exchanges so far."""
    calls = None if group is None else _calls.get(beside(group))
    mark = 0 if calls is None else calls.digest % _DIGEST
    return [float(mark), float(mark * mark)]


def compare(group: ProcessGroup | None, sums: list[float]) -> None:
    r"""Raises if ranks made different exchanges (collective where they did).

    Args:
        group: That the sum was taken over.
        sums: Of what :func:`tally` returned on every rank.

    Raises:
        AgreementError: Ranks made different exchanges; on every rank, with the number that each made.
    """
    if group is None or int(sums[0]) ** 2 == dist.get_world_size(group) * int(sums[1]):  # equal only if all marks are
        return
    calls = _calls.get(beside(group)) or _Calls()
    shown = ", ".join(f"{kind} of {str(dtype).removeprefix('torch.')} {list(shape)}" for kind, dtype, shape in calls.last)
    step = f"{lost.where()} after {calls.count} exchanges, the last of them {shown or 'none'}"
    told = agree(group, step, {"the exchanges so far": calls.digest})
    raise AssertionError(f"ranks that made different exchanges agree: {told}")
