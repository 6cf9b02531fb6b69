r"""Rows and small reductions over :mod:`torch.distributed`: the one place that knows gloo from NCCL.

Everything here takes an *own group*: a process group that nobody else talks on, so that the backward pass of a
route and the gradient buckets of :class:`~torch.nn.parallel.DistributedDataParallel` cannot meet out of order.
``None`` stands for "alone", where every call is the identity.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar.errors import AgreementError, RouteError

# gloo moves these as they are; every other dtype travels as its bytes.
_WIRE_DTYPES = {
    torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool,
}  # fmt: skip
_CHECKED_CALLS = 64
_NUM_FIELDS, _TEXT_BYTES = 16, 384


@dataclass
class Meter:
    r"""What this process spent on exchanges since the last :meth:`reset`.

    ``seconds`` is the time blocked in exchanges, ``bytes_sent`` the payload handed to other ranks, ``messages`` the
    number of non-empty blocks sent, and ``calls`` the number of exchanges.
    """

    seconds: float = 0.0
    bytes_sent: int = 0
    messages: int = 0
    calls: int = 0

    def reset(self) -> None:
        self.seconds, self.bytes_sent, self.messages, self.calls = 0.0, 0, 0, 0


meter = Meter()
# What begins an exchange of rows; a simulated network stands in for it.
all_to_all: Callable[..., Any] = dist.all_to_all_single
_own_groups: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()
_owned: WeakSet[ProcessGroup] = WeakSet()


def own_group(parent: ProcessGroup | None = None) -> ProcessGroup | None:
    r"""Returns the group that partpar talks on beside :obj:`parent`, making it at the first call (collective).

    All routes over one parent share one group: within a rank their exchanges follow the program's order, which is
    the same on every rank.

    Args:
        parent: The user's group; :obj:`None` means the default group.

    Returns:
        :obj:`None` when torch.distributed is not initialised or the parent has one rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    parent = dist.group.WORLD if parent is None else parent
    if not isinstance(parent, ProcessGroup):  # torch's NON_GROUP_MEMBER is a number
        raise RouteError(
            "expected a process group that this rank is a member of, found one that it is not in"
        )
    if dist.get_world_size(parent) == 1:
        return None
    if parent in _owned:  # a route may be built on another one's group
        return parent
    own = _own_groups.get(parent)
    if own is None:
        ranks = dist.get_process_group_ranks(parent)
        own = dist.new_group(
            ranks, timeout=_timeout(parent), backend=dist.get_backend(parent), use_local_synchronization=True
        )
        _own_groups[parent] = own
        _owned.add(own)
    return own


def forget_groups() -> None:
    r"""Lets go of the groups made here, before the process group that they stand beside is ended."""
    _own_groups.clear()


def _timeout(group: ProcessGroup) -> timedelta:
    """The timeout of a group: ``new_group`` would otherwise fall back to half an hour."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    return group._get_backend(device).options._timeout


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    r"""Rank and number of ranks of an own group; ``(0, 1)`` when alone."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _wire_device(group: ProcessGroup) -> torch.device | None:
    """gloo talks from host memory, NCCL from the current GPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(group) == "nccl"
        else torch.device("cpu")
    )


# --- agreement ------------------------------------------------------------------------------------------------------


@dataclass
class Checks:
    r"""Decides which calls are checked for agreement. It counts calls, and every rank counts the same ones, so that
    ranks that disagree about *what* they exchange still agree that they compare notes first. The first calls see
    every layer of a model forwards and backwards; ``PARTPAR_DEBUG=1`` checks all.
    """

    calls: int = 0
    always: bool = field(default_factory=lambda: os.environ.get("PARTPAR_DEBUG", "0") not in ("", "0"))

    def due(self) -> bool:
        self.calls += 1
        return self.always or self.calls <= _CHECKED_CALLS


def agree(
    group: ProcessGroup | None, what: str, fields: dict[str, int], error: str | None = None
) -> list[dict[str, int]]:
    r"""Compares what each rank is about to do, before any rank does it.

    Args:
        group: An own group; alone, only :obj:`error` is looked at.
        what: The call's name, for messages.
        fields: Name and value of what must be equal on all ranks. A name that starts with ``"_"`` may differ.
        error: What this rank found wrong with its own input. All ranks then raise.

    Returns:
        The fields of every rank.

    Raises:
        RouteError: A rank has an error to tell; on every rank, with that message.
        AgreementError: A field differs; on every rank, with both values.
    """
    if group is None:
        if error is not None:
            raise RouteError(error)
        return [dict(fields)]
    assert len(fields) < _NUM_FIELDS - 1
    text = what.encode()[: _TEXT_BYTES // 4] if error is None else error.encode()[: _TEXT_BYTES - 1]
    buffer = torch.zeros(_NUM_FIELDS * 8 + _TEXT_BYTES, dtype=torch.uint8)
    numbers = torch.tensor([int(error is not None), len(text), *fields.values()], dtype=torch.int64)
    buffer[: numbers.numel() * 8] = numbers.view(torch.uint8)
    buffer[_NUM_FIELDS * 8 : _NUM_FIELDS * 8 + len(text)] = torch.frombuffer(
        bytearray(text), dtype=torch.uint8
    )
    mine = buffer.to(_wire_device(group))
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    headers = [g.cpu() for g in gathered]

    rows = [h[: _NUM_FIELDS * 8].view(torch.int64).tolist() for h in headers]
    texts = [
        bytes(h[_NUM_FIELDS * 8 : _NUM_FIELDS * 8 + r[1]].tolist()).decode(errors="replace")
        for h, r in zip(headers, rows, strict=True)
    ]
    failed = [f"rank {rank}: {texts[rank]}" for rank, row in enumerate(rows) if row[0]]
    if failed:
        raise RouteError("; ".join(failed))
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


def tensor_fields(x: Tensor) -> dict[str, int]:
    r"""What two tensors must share so that their rows can be exchanged: dtype, trailing shape, and whether a backward
    pass will follow."""
    dims = {f"size of dimension {i + 1}": n for i, n in enumerate(x.shape[1:9])}
    return {
        "dtype": _DTYPES.index(x.dtype),
        "requires_grad": int(x.requires_grad),
        "number of dimensions": x.dim(),
        **dims,
    }


def _show(name: str, value: int) -> str:
    if name == "dtype":
        return str(_DTYPES[value])
    return str(bool(value)) if name == "requires_grad" else str(value)


# --- rows -----------------------------------------------------------------------------------------------------------


class RowsInFlight:
    r"""An exchange of rows that has begun; :meth:`wait` returns the rows received.

    Args:
        out: Where the rows are to be in the end.
        work: What to await; :obj:`None` when nothing is under way.
        landing: Where they arrive, if elsewhere: in another dtype, or as bytes.
        sent: The send buffer, which must outlive the exchange.
    """

    def __init__(
        self, out: Tensor, work: Any = None, landing: Tensor | None = None, sent: Tensor | None = None
    ) -> None:
        self._out, self._work, self._landing, self._sent = out, work, landing, sent

    def wait(self) -> Tensor:
        if self._work is not None:
            start = time.perf_counter()
            self._work.wait()
            if self._landing is not None and self._landing is not self._out:
                as_bytes = self._landing.dtype == torch.uint8 != self._out.dtype
                self._out.copy_(
                    self._landing.view(self._out.dtype).view(self._out.shape) if as_bytes else self._landing
                )
            meter.seconds += time.perf_counter() - start
            self._work = self._landing = self._sent = None
        return self._out


def bytes_on_wire(dtype: torch.dtype, wire_dtype: torch.dtype | None) -> int:
    r"""Bytes that an element takes on its way."""
    narrows = wire_dtype is not None and dtype.is_floating_point and wire_dtype.itemsize < dtype.itemsize
    return (wire_dtype if narrows and wire_dtype is not None else dtype).itemsize


def send_rows(
    rows: Tensor,
    send_splits: Sequence[int],
    recv_splits: Sequence[int],
    group: ProcessGroup | None,
    out: Tensor | None = None,
    wire_dtype: torch.dtype | None = None,
) -> RowsInFlight:
    r"""Begins sending block p of :obj:`rows` to rank p and receiving a block from each rank.

    Args:
        rows: ``[sum(send_splits), *]``, blocks in rank order.
        send_splits: Rows to each rank.
        recv_splits: Rows from each rank; every rank's view must match (:func:`swap_rows` finds out).
        group: An own group.
        out: ``[sum(recv_splits), *]``, to receive into.
        wire_dtype: Floating rows of a wider dtype are rounded to this one on the wire.
    """
    if out is None:
        out = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
    if group is None or rows.shape[1:].numel() == 0:
        return RowsInFlight(out)
    start = time.perf_counter()
    wire, landing = rows.contiguous(), out
    if wire_dtype is not None and bytes_on_wire(rows.dtype, wire_dtype) < rows.element_size():
        wire = wire.to(wire_dtype)
    if wire.dtype not in _WIRE_DTYPES:
        wire = wire.view(wire.size(0), wire.shape[1:].numel()).view(torch.uint8)
    wire = wire.to(_wire_device(group))
    if wire.dtype != out.dtype or wire.device != out.device or not out.is_contiguous():
        landing = wire.new_empty((sum(recv_splits), *wire.shape[1:]))
    work = all_to_all(landing, wire, list(recv_splits), list(send_splits), group=group, async_op=True)
    rank = dist.get_rank(group)
    sent = [n for peer, n in enumerate(send_splits) if peer != rank]
    meter.bytes_sent += sum(sent) * wire.shape[1:].numel() * wire.element_size()
    meter.messages += sum(n > 0 for n in sent)
    meter.calls += 1
    meter.seconds += time.perf_counter() - start
    return RowsInFlight(out, work, landing, wire)


def swap_rows(
    rows: Tensor, send_splits: Sequence[int], group: ProcessGroup | None
) -> tuple[Tensor, list[int]]:
    r"""Sends blocks whose sizes the receivers do not know yet; returns the rows received and how many came from whom."""
    if group is None:
        return rows, list(send_splits)
    device = _wire_device(group)
    counts = torch.tensor(list(send_splits), dtype=torch.int64, device=device)
    heard = torch.empty_like(counts)
    dist.all_to_all_single(heard, counts, group=group)
    recv_splits = heard.tolist()
    return send_rows(rows, send_splits, recv_splits, group).wait(), recv_splits


# --- small reductions -----------------------------------------------------------------------------------------------


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        start = time.perf_counter()
        wire = x.detach().to(_wire_device(group), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(wire, group=group)
        meter.seconds += time.perf_counter() - start
        return wire.to(x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad, ctx.group), None


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    r"""Sum over all ranks, the same on each; its gradient is the sum of all ranks' gradients. The identity when alone."""
    return x if group is None else _AllReduceSum.apply(x, group)
