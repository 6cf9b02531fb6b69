r"""Moving rows between ranks as functions that autograd knows: at once, and in two phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange

if TYPE_CHECKING:
    from partpar.route import Route


@dataclass(frozen=True)
class Blocks:
    r"""How many rows go to each rank and come from each rank.

    Args:
        send_splits: Rows to each rank.
        recv_splits: Rows from each rank.
        group: An own group, or :obj:`None` when alone.
        wire_dtype: What rows of a wider floating dtype are rounded to on their way; :obj:`None` leaves them exact.
    """

    send_splits: Sequence[int]
    recv_splits: Sequence[int]
    group: ProcessGroup | None
    wire_dtype: torch.dtype | None = None

    def back(self) -> Blocks:
        r"""The same blocks the other way."""
        return replace(self, send_splits=self.recv_splits, recv_splits=self.send_splits)

    def begin(self, rows: Tensor, out: Tensor | None = None) -> exchange.RowsInFlight:
        r"""Begins sending; ``[sum(send_splits), *]`` to ``[sum(recv_splits), *]``."""
        return exchange.send_rows(rows, self.send_splits, self.recv_splits, self.group, out, self.wire_dtype)


class BlocksInFlight:
    r"""Rows on their way. In the backward pass their gradient leaves when that of what :meth:`wait` returned is known,
    and is awaited only when that of the rows sent is asked for: work begun between the two phases overlaps both ways.

    Args:
        rows: ``[sum(send_splits), *]``.
        blocks: Their way.
    """

    def __init__(self, rows: Tensor, blocks: Blocks) -> None:
        self._flight = _Flight(blocks)
        self._landing: Tensor = _Start.apply(rows, self._flight)

    def wait(self) -> Tensor:
        r"""Awaits and returns ``[sum(recv_splits), *]``."""
        return _Land.apply(self._landing, self._flight)


class RouteInFlight:
    r"""A :meth:`Route.apply` that has begun."""

    def __init__(self, x: Tensor, route: Route) -> None:
        self._x, self._route = x, route
        self._halo = BlocksInFlight(x.index_select(0, route.send_index), route.blocks)

    def wait_halo(self) -> Tensor:
        r"""Awaits and returns the ``[num_halo, *]`` halo rows alone."""
        return self._halo.wait()

    def wait(self) -> Tensor:
        r"""Awaits the halo and returns what :meth:`Route.apply` would: ``[num_src, *]``."""
        out = join(self._x, self.wait_halo())
        return out if self._route.order is None else out.index_select(0, self._route.order)


@dataclass
class _Flight:
    """What is under way, forwards and backwards, between the two halves of an exchange."""

    blocks: Blocks
    forward: exchange.RowsInFlight | None = None
    backward: exchange.RowsInFlight | None = None


class _Start(torch.autograd.Function):
    """Sends rows; in the backward pass, awaits their gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        landing = rows.new_empty((sum(flight.blocks.recv_splits), *rows.shape[1:]))
        flight.forward = flight.blocks.begin(rows, landing)
        return landing

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight: _Flight = ctx.flight
        if flight.backward is None:  # a pass that is to be differentiated again: nothing was sent ahead
            return _Swap.apply(grad, flight.blocks.back()), None
        received, flight.backward = flight.backward.wait(), None
        return received, None


class _Land(torch.autograd.Function):
    """Awaits rows; in the backward pass, sends their gradient ahead."""

    @staticmethod
    def forward(ctx: Any, landing: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        assert flight.forward is not None
        flight.forward.wait()
        flight.forward = None
        return landing.view_as(landing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            return grad, None
        ctx.flight.backward = ctx.flight.blocks.back().begin(grad)
        # The gradient itself travels; autograd is only owed something of the right shape.
        return grad.new_zeros(()).expand_as(grad), None


class _Swap(torch.autograd.Function):
    """Sends and awaits at once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return blocks.begin(rows).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(grad, ctx.blocks.back()), None


class Apply(torch.autograd.Function):
    """Owned rows to "owned, then halo"; its transpose is :class:`ReduceSum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, blocks: Blocks) -> Tensor:
        ctx.route, ctx.blocks = route, blocks
        out = x.new_empty((route.num_owned + route.num_halo, *x.shape[1:]))
        # A received block is the halo slice: it is written straight into its place.
        flight = blocks.begin(x.index_select(0, route.send_index), out[route.num_owned :])
        out[: route.num_owned] = x
        flight.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ReduceSum.apply(grad, ctx.route, ctx.blocks), None, None


class ReduceSum(torch.autograd.Function):
    """ "Owned, then halo" to owned rows, halo rows added at their owner; its transpose is :class:`Apply`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, blocks: Blocks) -> Tensor:
        ctx.route, ctx.blocks = route, blocks
        flight = blocks.back().begin(x[route.num_owned :])
        out = x[: route.num_owned].clone(memory_format=torch.contiguous_format)
        return out.index_add_(0, route.send_index, flight.wait())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Apply.apply(grad, ctx.route, ctx.blocks), None, None


class Max(torch.autograd.Function):
    """Largest copy of each owned row; ties share the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        place = torch.arange(route.num_src, device=x.device) if route.order is None else route.order
        out = x.new_zeros((route.num_owned + route.num_halo, *x.shape[1:]))
        _max_into(out, place, x, include_self=False)
        received = route.blocks.back().begin(out[route.num_owned :]).wait()
        out = out[: route.num_owned].contiguous()
        absent = torch.ones(route.num_owned, dtype=torch.bool, device=x.device)
        absent[place[place < route.num_owned]] = False
        out[absent] = torch.finfo(x.dtype).min if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
        _max_into(out, route.send_index, received, include_self=True)
        absent[route.send_index] = False
        out[absent] = 0
        ctx.route = route
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, out = ctx.saved_tensors
        tied = (x.detach() == ctx.route.apply(out.detach())).to(grad.dtype)
        ties = ctx.route.sum_copies(tied).clamp_(min=1)
        return tied * ctx.route.apply(grad / ties), None


def _max_into(out: Tensor, index: Tensor, rows: Tensor, include_self: bool) -> None:
    """``out[index[i]] = max(out[index[i]], rows[i])``"""
    index = index.view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
    out.scatter_reduce_(0, index, rows, "amax", include_self=include_self)


def join(owned: Tensor, halo: Tensor) -> Tensor:
    """Owned rows, then halo. ``torch.cat`` takes no gradient to an empty 1-dimensional tensor, and a rank that owns
    nothing would then miss the backward exchange."""
    if owned.dim() == 1:
        return torch.cat([owned.unsqueeze(1), halo.unsqueeze(1)]).squeeze(1)
    return torch.cat([owned, halo])
