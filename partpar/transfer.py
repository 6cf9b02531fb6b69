r"""Moving rows by a route's tables, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partpar import exchange

if TYPE_CHECKING:
    from partpar.route import Route


def pull(route: Route, x: Tensor, out: Tensor) -> exchange.RowsInFlight:
    """Owner to halo, into ``out``."""
    return exchange.send_rows(x.index_select(0, route.send_index), route.send_splits, route.recv_splits, route.group, out)


def push(route: Route, halo: Tensor) -> exchange.RowsInFlight:
    """Halo to owner; the rows arrive in the order of ``send_index``."""
    return exchange.send_rows(halo, route.recv_splits, route.send_splits, route.group)


class RouteInFlight:
    r"""An :meth:`Route.apply` that has begun."""

    def __init__(self, x: Tensor, route: Route) -> None:
        self._x, self._route, self._flight = x, route, _Flight()
        self._halo: Tensor = _Start.apply(x, route, self._flight)

    def wait_halo(self) -> Tensor:
        r"""Awaits and returns the ``[num_halo, *]`` halo rows alone."""
        return _Land.apply(self._halo, self._route, self._flight)

    def wait(self) -> Tensor:
        r"""Awaits the halo and returns what :meth:`Route.apply` would: ``[num_src, *]``."""
        out = _join(self._x, self.wait_halo())
        return out if self._route.order is None else out.index_select(0, self._route.order)


@dataclass
class _Flight:
    """What is under way, forwards and backwards, between the two halves of an exchange."""

    forward: exchange.RowsInFlight | None = None
    backward: exchange.RowsInFlight | None = None


class Apply(torch.autograd.Function):
    """Owned rows to "owned, then halo"; its transpose is :class:`ReduceSum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        out = x.new_empty((route.num_owned + route.num_halo, *x.shape[1:]))
        flight = pull(route, x, out[route.num_owned :])
        out[: route.num_owned] = x
        flight.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ReduceSum.apply(grad, ctx.route), None


class ReduceSum(torch.autograd.Function):
    """"Owned, then halo" to owned rows, halo rows added at their owner; its transpose is :class:`Apply`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        ctx.route = route
        flight = push(route, x[route.num_owned :])
        out = x[: route.num_owned].clone(memory_format=torch.contiguous_format)
        return out.index_add_(0, route.send_index, flight.wait())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return Apply.apply(grad, ctx.route), None


def _join(owned: Tensor, halo: Tensor) -> Tensor:
    """Owned rows, then halo. ``torch.cat`` takes no gradient to an empty 1-dimensional tensor, and a rank that owns
    nothing would then miss the backward exchange."""
    if owned.dim() == 1:
        return torch.cat([owned.unsqueeze(1), halo.unsqueeze(1)]).squeeze(1)
    return torch.cat([owned, halo])


def _max_into(out: Tensor, index: Tensor, rows: Tensor, include_self: bool) -> None:
    """``out[index[i]] = max(out[index[i]], rows[i])``"""
    index = index.view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
    out.scatter_reduce_(0, index, rows, "amax", include_self=include_self)


class Max(torch.autograd.Function):
    """Largest copy of each owned row; ties share the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        place = torch.arange(route.num_src, device=x.device) if route.order is None else route.order
        out = x.new_zeros((route.num_owned + route.num_halo, *x.shape[1:]))
        _max_into(out, place, x, include_self=False)
        received = push(route, out[route.num_owned :]).wait()
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, out = ctx.saved_tensors
        tied = (x.detach() == ctx.route.apply(out.detach())).to(grad.dtype)
        ties = ctx.route.sum_copies(tied).clamp_(min=1)
        return tied * ctx.route.apply(grad / ties), None


class _Start(torch.autograd.Function):
    """Sends the owned rows; in the backward pass, awaits the halo's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, flight: _Flight) -> Tensor:
        ctx.route, ctx.flight, ctx.shape = route, flight, x.shape
        halo = x.new_empty((route.num_halo, *x.shape[1:]))
        flight.forward = pull(route, x, halo)
        return halo

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        route: Route = ctx.route
        if ctx.flight.backward is None:  # a double backward pass: nothing was sent ahead
            padded = _join(grad.new_zeros(ctx.shape), grad)
            return ReduceSum.apply(padded, route), None, None
        received, ctx.flight.backward = ctx.flight.backward.wait(), None
        return received.new_zeros(ctx.shape).index_add_(0, route.send_index, received), None, None


class _Land(torch.autograd.Function):
    """Awaits the halo rows; in the backward pass, sends their gradient ahead."""

    @staticmethod
    def forward(ctx: Any, halo: Tensor, route: Route, flight: _Flight) -> Tensor:
        ctx.route, ctx.flight = route, flight
        assert flight.forward is not None
        flight.forward.wait()
        return halo.view_as(halo)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():
            return grad, None, None
        ctx.flight.backward = push(ctx.route, grad)
        # The gradient itself travels; autograd is only owed something of the right shape.
        return grad.new_zeros(()).expand_as(grad), None, None
