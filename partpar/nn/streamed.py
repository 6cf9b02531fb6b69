r"""Layers that go over their rows piece by piece, forwards and backwards, and keep only their input.

Most layers sum rows over in-neighbours and treat each row by itself before and after,

.. math::
    Y = g(A \\, f(X), X).

Whatever lies between :math:`X` and :math:`Y` is then needed for few rows at a time: a piece of the sum is made, goes
through :math:`g`, and is forgotten. The backward pass fetches slots and sums again (gradient checkpointing, Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", 2016, but by rows within a layer), so that beside input, output and their
gradients nothing as long as the rows is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from partpar.kernels import heap
from partpar.nn.dropout import Dropout
from partpar.nn.mlp import MLP
from partpar.nn.neighbour_sum import Edges, NeighbourSum, pieces
from partpar.nn.recompute import Tape
from partpar.nn.source_rows import SourceRows
from partpar.route import Route

_ROW_WISE = (
    torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Identity, torch.nn.ReLU, torch.nn.LeakyReLU, torch.nn.PReLU, torch.nn.ELU,
    torch.nn.GELU, torch.nn.SiLU, torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.Softplus, pyg_nn.Linear, Dropout,
)  # fmt: skip
_OF_ROW_WISE = (torch.nn.Sequential, torch.nn.ModuleList, MLP)


def row_wise(module: object) -> bool:
    r"""Whether a module is known to treat each row by itself, and to draw nothing but what goes by raw ids."""
    if isinstance(module, pyg_nn.LayerNorm):
        return module.mode == "node"
    if isinstance(module, _OF_ROW_WISE):
        return all(row_wise(member) for member in module.children())
    return module is None or type(module) in _ROW_WISE


@dataclass(frozen=True, eq=False)
class Stages:
    r"""A layer in the form :math:`g(A f(X), X)`.

    Args:
        sum: The sum over in-neighbours, :math:`A`.
        after: :math:`g`; takes rows of the sum, the same of :math:`X`, and a route that knows no more than their raw ids.
        before: :math:`f`, a map of each row; :obj:`None` for the identity.
        scale: ``[num_owned, 1]``, constants that rows of the sum are multiplied by.
        sources: Constant rows of all sources that stand for :math:`X` in :math:`f(X)`.
        received: Slots of constant rows, fetched once.
    """

    sum: Edges | NeighbourSum
    after: Callable[[Tensor, Tensor, Route], Tensor]
    before: Callable[[Tensor], Tensor] | None = None
    scale: Tensor | None = None
    sources: Tensor | None = None
    received: Tensor | None = None

    def then(self, follow: Callable[[Tensor, Route], Tensor]) -> Stages:
        r"""The same layer, and what treats each row of its output."""
        after = self.after
        return replace(self, after=lambda total, x, route: follow(after(total, x, route), route))


def stages_of(
    plan: Edges | NeighbourSum,
    x: Tensor | SourceRows,
    after: Callable[[Tensor, Tensor, Route], Tensor],
    **more: Any,
) -> Stages:
    r"""Stages whose sum of constant rows fetches their slots once (collective)."""
    received = None
    if isinstance(x, SourceRows):
        rows = x.owned
        received = x.keep(("slots", plan), lambda: plan.fetch(rows))
    return Stages(plan, after, received=received, **more)


def streamed(
    stages: Stages,
    x: Tensor | SourceRows,
    route: Route | None,
    modules: Sequence[object],
    private: bool = False,
) -> Tensor:
    r"""Runs a layer piece by piece (collective).

    Args:
        stages: The layer.
        x: ``[num_owned, C]``, constant or not.
        route: The share's route.
        modules: Where the parameters of the stages are.
        private: The output goes to another streamed layer and to nobody else, so that the memory of its gradient may be
            used again.

    Returns:
        ``[num_owned, C_out]``.
    """
    heap.map_large_blocks()
    if isinstance(x, SourceRows):
        heap.give_back()  # a step begins: what plans and pieces of the last one left
    found = {
        p: None for m in modules if isinstance(m, torch.nn.Module) for p in m.parameters() if p.requires_grad
    }
    rows = x.owned if isinstance(x, SourceRows) else x
    raw_ids = torch.arange(rows.size(0), device=rows.device) if route is None else route.raw_ids
    run = _Run(stages, raw_ids, tuple(found), Tape(), private)
    out: Tensor = _Streamed.apply(run, rows, *found)
    return out


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, *parameters)  # parameters only to notice if somebody changes them
        return run.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pull = _Pull(ctx.run.parameters)
        grad_x = ctx.run.backward(list(ctx.saved_tensors[:1]), grad, ctx.needs_input_grad[1], pull)
        return None, grad_x, *pull.grads


class _Pull:
    """Pulls gradients back through a map of some rows, and adds up those of parameters."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self.parameters = parameters
        self.grads: list[Tensor | None] = [None] * len(parameters)

    def __call__(self, out: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor | None]:
        """The gradients of those inputs that want one."""
        if not out.requires_grad:
            return [None] * len(inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = list(torch.autograd.grad(out, [*wanted, *self.parameters], grad, allow_unused=True))
        for i, of_parameter in enumerate(found[len(wanted) :]):
            if of_parameter is not None:
                sum_so_far = self.grads[i]
                self.grads[i] = of_parameter if sum_so_far is None else sum_so_far.add_(of_parameter)
        return [found.pop(0) if t.requires_grad else None for t in inputs]


@dataclass
class _Run:
    """One call of a streamed layer: its pieces forwards, and again backwards."""

    stages: Stages
    raw_ids: Tensor
    parameters: tuple[Tensor, ...]
    tape: Tape
    private: bool

    def forward(self, x: Tensor) -> Tensor:
        total, out = self._begin(x)[1], None
        for first, last in pieces(x.size(0)):
            # All pieces belong to one step: the first draws it, the others repeat it.
            with self.tape.first() if out is None else self.tape.again():
                piece = self.stages.after(total(first, last), x[first:last], self._route(first, last))
            if out is None:
                out = piece.new_empty(x.size(0), *piece.shape[1:])
            out[first:last] = piece
        assert out is not None
        return out

    def backward(self, held: list[Tensor], grad: Tensor, wants_x: bool, pull: _Pull) -> Tensor | None:
        # Out of the list, so that the input's memory is free once no piece needs it: if this layer is itself run
        # again, nobody else holds it.
        stages, x = self.stages, held.pop()
        mapped, total = self._begin(x)
        through_sum = wants_x or stages.before is not None
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
        grad_sum = None
        for first, last in pieces(x.size(0)):
            rows = x[first:last].detach().requires_grad_(wants_x)
            with torch.enable_grad(), self.tape.again():
                summed = total(first, last).detach().requires_grad_(through_sum)
                out = stages.after(summed, rows, self._route(first, last))
            of_sum, of_rows = pull(out, grad[first:last], summed, rows)
            if grad_x is not None:
                _put(grad_x[first:last], of_rows)
            if through_sum:
                if grad_sum is None:
                    grad_sum = self._memory(grad, x.size(0), summed)
                _put(grad_sum[first:last], of_sum)
                if stages.scale is not None:
                    grad_sum[first:last] *= stages.scale[first:last]
        if grad_sum is None:
            return None
        if stages.before is None:
            assert grad_x is not None
            del x, mapped, total, rows, summed, out, of_sum, of_rows
            stages.sum.add_transposed(grad_sum, grad_x)
            return grad_x
        grad_mapped = mapped.zero_()  # it has served: its memory is used again
        del total, mapped
        stages.sum.add_transposed(grad_sum, grad_mapped)
        del grad_sum
        sources = x if stages.sources is None else stages.sources
        for first, last in pieces(sources.size(0)):
            rows = sources[first:last].detach().requires_grad_(wants_x)
            with torch.enable_grad():
                out = stages.before(rows)
            (of_rows,) = pull(out, grad_mapped[first:last], rows)
            if grad_x is not None and of_rows is not None:
                grad_x[first:last] += of_rows
        return grad_x

    def _begin(self, x: Tensor) -> tuple[Tensor, Callable[[int, int], Tensor]]:
        """What is summed, and what sums it for a range of rows."""
        stages, mapped = self.stages, x
        if stages.before is not None:
            sources = x if stages.sources is None else stages.sources
            mapped = torch.cat(
                [stages.before(sources[first:last]) for first, last in pieces(sources.size(0))]
            )
        received = stages.sum.fetch(mapped) if stages.received is None else stages.received
        total = stages.sum.begin(mapped, received)
        scale = stages.scale
        return mapped, total if scale is None else lambda first, last: total(first, last).mul_(
            scale[first:last]
        )

    def _route(self, first: int, last: int) -> Route:
        """A range of rows is a share that needs nobody."""
        return Route.trivial(last - first, self.raw_ids[first:last])

    def _memory(self, grad: Tensor, num_rows: int, like: Tensor) -> Tensor:
        """Where the gradient of the sum goes: over that of the output, if nobody else looks at it."""
        shape = (num_rows, *like.shape[1:])
        if self.private and grad.shape == shape and grad.dtype == like.dtype and grad.is_contiguous():
            return grad
        return like.new_empty(shape)


def _put(rows: Tensor, values: Tensor | None) -> None:
    if values is None:
        rows.zero_()
    else:
        rows.copy_(values)
