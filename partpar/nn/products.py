r"""Rows of several relations, each through its own matrix, one behind another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stacked_products(rows: list[Tensor], weights: list[Tensor]) -> Tensor:
    r"""``torch.cat([r @ w for r, w in zip(rows, weights)])`` without the copy: each product is written to its place.

    Args:
        rows: For each relation ``[N_r, F_in]``.
        weights: For each ``[F_in, F_out]``, in the rows' dtype.

    Returns:
        ``[sum of N_r, F_out]``, differentiable any number of times.
    """
    out: Tensor = _StackedProducts.apply(*rows, *weights)
    return out


class _StackedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        rows, weights = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        sizes = [piece.size(0) for piece in rows]
        out = rows[0].new_empty(sum(sizes), weights[0].size(1))
        for x, weight, into in zip(rows, weights, out.split(sizes), strict=True):
            torch.mm(x, weight, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, needed = ctx.saved_tensors, ctx.needs_input_grad
        number = len(factors) // 2
        rows, weights = factors[:number], factors[number:]
        grads = grad.split([piece.size(0) for piece in rows])
        of_rows = [g @ w.t() if n else None for g, w, n in zip(grads, weights, needed[:number], strict=True)]
        of_weights = [x.t() @ g if n else None for x, g, n in zip(rows, grads, needed[number:], strict=True)]
        return *of_rows, *of_weights
