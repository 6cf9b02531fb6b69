r"""The largest and the smallest row entry over in-edges. A gradient is split evenly over all tied entries."""

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from partpar.kernels.adjacency import Adjacency
from partpar.kernels.linear import accumulating
from partpar.kernels.prefetch import prefetch
from partpar.kernels.rows import AHEAD, LINE_BYTES
from partpar.kernels.threads import for_rows


@njit(nogil=True, cache=True)
def _extreme_rows(
    lo: int, hi: int, indptr: np.ndarray, indices: np.ndarray, x: np.ndarray, sign: int, out: np.ndarray
) -> None:
    r"""``out[i]``: the extreme of ``x[indices[e]]`` per column; NaN if any is; zero in rows without edges."""
    width, flat, last = x.shape[1], x.reshape(-1), indices.shape[0] - 1
    factor = x.dtype.type(sign)
    for i in range(lo, hi):
        best = out[i]
        start, end = indptr[i], indptr[i + 1]
        if start == end:
            best[:] = 0
            continue
        best[:] = x[indices[start]]
        for e in range(start + 1, end):
            at = np.int64(indices[min(e + AHEAD, last)]) * width
            for c in range(0, width, LINE_BYTES // x.itemsize):
                prefetch(flat, at + c)
            row = x[indices[e]]
            for c in range(width):
                value, old = row[c], best[c]
                best[c] = value if factor * value > factor * old or value != value else old


@njit(nogil=True, cache=True)
def _extreme_rows_counting(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    x: np.ndarray,
    sign: int,
    out: np.ndarray,
    count: np.ndarray,
) -> None:
    r"""The same, and in ``count`` the number of edges that reach it (one where there are none)."""
    width, flat, last = x.shape[1], x.reshape(-1), indices.shape[0] - 1
    factor, one = x.dtype.type(sign), x.dtype.type(1)  # a plain 1 would widen the loop to float64
    for i in range(lo, hi):
        best, ties = out[i], count[i]
        ties[:] = 1
        start, end = indptr[i], indptr[i + 1]
        if start == end:
            best[:] = 0
            continue
        best[:] = x[indices[start]]
        for e in range(start + 1, end):
            at = np.int64(indices[min(e + AHEAD, last)]) * width
            for c in range(0, width, LINE_BYTES // x.itemsize):
                prefetch(flat, at + c)
            row = x[indices[e]]
            for c in range(width):
                value, old, tied = row[c], best[c], ties[c]
                better = factor * value > factor * old or value != value
                best[c] = value if better else old
                ties[c] = one if better else (tied + one if value == old else tied)


@njit(nogil=True, cache=True)
def _give_rows(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    best: np.ndarray,
    shared: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
) -> None:
    r"""``out[j] = sum of shared[i]`` over the out-edges of ``j``, in the columns where ``x[j]`` is the best
    of ``i``.
    """
    width, last = x.shape[1], indices.shape[0] - 1
    flat_best, flat_shared = best.reshape(-1), shared.reshape(-1)
    zero = x.dtype.type(0)
    for j in range(lo, hi):
        into, own = out[j], x[j]
        into[:] = 0
        for e in range(indptr[j], indptr[j + 1]):
            at = np.int64(indices[min(e + AHEAD // 2, last)]) * width
            for c in range(0, width, LINE_BYTES // x.itemsize):
                prefetch(flat_best, at + c)
            for c in range(0, width, LINE_BYTES // x.itemsize):
                prefetch(flat_shared, at + c)
            other, part = best[indices[e]], shared[indices[e]]
            for c in range(width):
                value = part[c]
                into[c] += value if own[c] == other[c] else zero


def extreme(adj: Adjacency, x: Tensor, largest: bool) -> Tensor:
    r"""The extreme over in-edges per column.

    Args:
        adj (Adjacency): The edges.
        x (Tensor): ``[num_src, *]``, contiguous.
        largest (bool): The largest, else the smallest.

    Returns:
        Tensor ``[num_dst, *]``; zero for destinations without in-edges.
    """
    function = _Extreme if x.device.type == "cpu" else ExtremeByScatter
    out: Tensor = function.apply(adj, x, largest)
    return out


class ExtremeByScatter(torch.autograd.Function):
    r"""The same in torch operations alone, for devices without a kernel here. Makes messages ``[E, *]``.

    Not torch's own gradient of ``scatter_reduce(include_self=False)``: that takes the zeros of an empty
    result for one more tied entry wherever the extreme is exactly zero.
    """

    @staticmethod
    def forward(ctx: Any, adj: Adjacency, x: Tensor, largest: bool) -> Tensor:
        index = adj.destinations.to(torch.int64).view(-1, *[1] * (x.dim() - 1)).expand(-1, *x.shape[1:])
        out = x.new_zeros(adj.num_dst, *x.shape[1:])
        out.scatter_reduce_(
            0, index, x.index_select(0, adj.indices), "amax" if largest else "amin", include_self=False
        )
        ctx.adj = adj
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        x, out = ctx.saved_tensors
        src, dst = ctx.adj.indices, ctx.adj.destinations
        reached = (x.index_select(0, src) == out.index_select(0, dst)).to(grad.dtype)
        count = torch.zeros_like(out).index_add_(0, dst, reached).clamp_(min=1)
        return (
            None,
            torch.zeros_like(x).index_add_(0, src, reached * (grad / count).index_select(0, dst)),
            None,
        )


def _flat(rows: Tensor, columns: int) -> np.ndarray:
    return rows.view(rows.size(0), columns).numpy()


class _Extreme(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, adj: Adjacency, x: Tensor, largest: bool) -> Tensor:
        wide = accumulating(x)
        columns = math.prod(x.shape[1:])
        out = torch.empty(adj.num_dst, *x.shape[1:], dtype=wide.dtype)
        indptr = adj.indptr.numpy()
        args = (indptr, adj.indices.numpy(), _flat(wide, columns), 1 if largest else -1, _flat(out, columns))
        if ctx.needs_input_grad[1]:
            count = torch.empty_like(out)
            for_rows(_extreme_rows_counting, indptr, columns, (*args, _flat(count, columns)))
            out = out.to(x.dtype)
            ctx.adj = adj
            ctx.save_for_backward(x, out, count)
            return out
        for_rows(_extreme_rows, indptr, columns, args)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        x, out, count = (accumulating(saved) for saved in ctx.saved_tensors)
        shared, there = accumulating(grad) / count, ctx.adj.transposed
        grad_x = torch.empty_like(x)
        columns = math.prod(x.shape[1:])
        for_rows(
            _give_rows,
            there.indptr.numpy(),
            2 * columns,
            (
                there.indptr.numpy(),
                there.indices.numpy(),
                *(_flat(part, columns) for part in (out, shared, x, grad_x)),
            ),
        )
        return None, grad_x.to(grad.dtype), None
