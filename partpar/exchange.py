r"""Rows and small reductions over :mod:`torch.distributed`: the one place that knows gloo from NCCL.

Everything here takes an *own group*: a process group that nobody else talks on, so that the backward pass of a
route and the gradient buckets of :class:`~torch.nn.parallel.DistributedDataParallel` cannot meet out of order.
``None`` stands for "alone", where every call is the identity. What torch raises where a rank is gone or late is raised
as a :class:`~partpar.errors.RankLostError` that names it; see :mod:`partpar.lost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import agreement
from partpar.agreement import Checks, agree, tensor_fields
from partpar.groups import forget_groups, own_group, rank_and_size, wire_device
from partpar.lost import awaiting

__all__ = [
    "Checks", "Meter", "RowsInFlight", "agree", "all_gather", "all_reduce_sum", "all_to_all", "bytes_on_wire", "forget_groups", "meter",
    "own_group", "rank_and_size", "send_rows", "swap_rows", "tensor_fields",
]  # fmt: skip

# gloo moves these as they are; every other dtype travels as its bytes.
_WIRE_DTYPES = {
    torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool,
}  # fmt: skip


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


# --- rows -----------------------------------------------------------------------------------------------------------


class RowsInFlight:
    r"""An exchange of rows that has begun; :meth:`wait` returns the rows received.

    Args:
        out: Where the rows are to be in the end.
        work: What to await; :obj:`None` when nothing is under way.
        landing: Where they arrive, if elsewhere: in another dtype, or as bytes.
        sent: The send buffer, which must outlive the exchange.
        group: Whose ranks are awaited.
    """

    def __init__(
        self,
        out: Tensor,
        work: Any = None,
        landing: Tensor | None = None,
        sent: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self._out, self._work, self._landing, self._sent, self._group = out, work, landing, sent, group

    def wait(self) -> Tensor:
        if self._work is not None:
            start = time.perf_counter()
            with awaiting(self._group):
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
    agreement.note(group, "send_rows", rows)
    start = time.perf_counter()
    wire, landing = rows.contiguous(), out
    if wire_dtype is not None and bytes_on_wire(rows.dtype, wire_dtype) < rows.element_size():
        wire = wire.to(wire_dtype)
    if wire.dtype not in _WIRE_DTYPES:
        wire = wire.view(wire.size(0), wire.shape[1:].numel()).view(torch.uint8)
    wire = wire.to(wire_device(group))
    if wire.dtype != out.dtype or wire.device != out.device or not out.is_contiguous():
        landing = wire.new_empty((sum(recv_splits), *wire.shape[1:]))
    with awaiting(group):
        work = all_to_all(landing, wire, list(recv_splits), list(send_splits), group=group, async_op=True)
    rank = dist.get_rank(group)
    sent = [n for peer, n in enumerate(send_splits) if peer != rank]
    meter.bytes_sent += sum(sent) * wire.shape[1:].numel() * wire.element_size()
    meter.messages += sum(n > 0 for n in sent)
    meter.calls += 1
    meter.seconds += time.perf_counter() - start
    return RowsInFlight(out, work, landing, wire, group)


def swap_rows(
    rows: Tensor, send_splits: Sequence[int], group: ProcessGroup | None
) -> tuple[Tensor, list[int]]:
    r"""Sends blocks whose sizes the receivers do not know yet; returns the rows received and how many came from whom."""
    if group is None:
        return rows, list(send_splits)
    agreement.note(group, "swap_rows", rows)
    counts = torch.tensor(list(send_splits), dtype=torch.int64, device=wire_device(group))
    heard = torch.empty_like(counts)
    with awaiting(group):
        dist.all_to_all_single(heard, counts, group=group)
    recv_splits = heard.tolist()
    return send_rows(rows, send_splits, recv_splits, group).wait(), recv_splits


# --- small reductions -----------------------------------------------------------------------------------------------


# Elements up to which each rank adds up all ranks' numbers itself: gloo then sends half as many messages one after the other.
_FEW = 4096


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        agreement.note(group, "all_reduce", x)
        if x.numel() <= _FEW and wire_device(group).type == "cpu":
            return _gather(x, group).sum(0, dtype=x.dtype)
        start = time.perf_counter()
        wire = x.detach().to(wire_device(group), copy=True, memory_format=torch.contiguous_format)
        with awaiting(group):
            dist.all_reduce(wire, group=group)
        meter.seconds += time.perf_counter() - start
        return wire.to(x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad, ctx.group), None


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    r"""Sum over all ranks, the same on each; its gradient is the sum of all ranks' gradients. The identity when alone."""
    return x if group is None else _AllReduceSum.apply(x, group)


def all_gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    r"""``[ranks, *]``, the tensors of all ranks, which are of one shape; without gradient."""
    if group is None:
        return x.detach().unsqueeze(0)
    agreement.note(group, "all_gather", x)
    return _gather(x.detach(), group)


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    start = time.perf_counter()
    wire = x.to(wire_device(group)).contiguous()
    out = wire.new_empty((dist.get_world_size(group), *wire.shape))
    with awaiting(group):
        dist.all_gather(list(out.unbind()), wire, group=group)
    meter.seconds += time.perf_counter() - start
    return out.to(x.device)
