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

# Edges of one destination that a byte tells apart.
UNTOLD = 255


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
def _extreme_rows_placed(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    x: np.ndarray,
    sign: int,
    out: np.ndarray,
    place: np.ndarray,
    unclear: np.ndarray,
) -> None:
    r"""The same, and in ``place`` which of the row's edges reaches it. Rows are ``unclear`` where some column has
    ties or NaN, or where there are more edges than a byte can tell apart."""
    width, flat, last = x.shape[1], x.reshape(-1), indices.shape[0] - 1
    factor = x.dtype.type(sign)
    # In 32 bits, as wide as most rows' entries: a loop over mixed widths is slow.
    where, tied = np.empty(width, np.int32), np.empty(width, np.int32)
    none, one = np.int32(0), np.int32(1)
    for i in range(lo, hi):
        best = out[i]
        start, end = indptr[i], indptr[i + 1]
        unclear[i] = end - start > UNTOLD
        if start == end:
            best[:] = 0
            continue
        best[:] = x[indices[start]]
        where[:] = 0
        for c in range(width):
            tied[c] = one if best[c] != best[c] else none
        for e in range(start + 1, end):
            at = np.int64(indices[min(e + AHEAD, last)]) * width
            for c in range(0, width, LINE_BYTES // x.itemsize):
                prefetch(flat, at + c)
            row, number = x[indices[e]], np.int32(e - start)
            for c in range(width):
                value, old = row[c], best[c]
                is_nan = value != value
                better = factor * value > factor * old or is_nan
                best[c] = value if better else old
                where[c] = number if better else where[c]
                tied[c] = one if is_nan or value == old else (none if better else tied[c])
        ties = none
        for c in range(width):
            ties |= tied[c]
            place[i, c] = where[c]
        unclear[i] |= ties


@njit(nogil=True, cache=True)
def _share_rows(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    x: np.ndarray,
    best: np.ndarray,
    unclear: np.ndarray,
    shared: np.ndarray,
) -> None:
    r"""Divides ``shared[i]`` by how many edges reach the best, in rows where these may be several."""
    width = x.shape[1]
    count = np.empty(width, x.dtype)
    one, zero = x.dtype.type(1), x.dtype.type(0)
    for i in range(lo, hi):
        if unclear[i]:
            count[:] = 0
            top, part = best[i], shared[i]
            for e in range(indptr[i], indptr[i + 1]):
                row = x[indices[e]]
                for c in range(width):
                    count[c] += one if row[c] == top[c] else zero
            for c in range(width):
                part[c] /= max(count[c], one)


@njit(nogil=True, cache=True)
def _give_rows(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    number: np.ndarray,
    place: np.ndarray,
    unclear: np.ndarray,
    best: np.ndarray,
    shared: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
) -> None:
    r"""``out[j] = sum of shared[i]`` over the out-edges of ``j``, in the columns that are reached by this edge, by its
    ``number`` among those of ``i``, or where that is unclear by comparing values.
    """
    width, last = x.shape[1], indices.shape[0] - 1
    flat_place, flat_shared = place.reshape(-1), shared.reshape(-1)
    zero = x.dtype.type(0)
    for j in range(lo, hi):
        into, own = out[j], x[j]
        into[:] = 0
        for e in range(indptr[j], indptr[j + 1]):
            at = np.int64(indices[min(e + AHEAD, last)]) * width
            for c in range(0, width, LINE_BYTES):
                prefetch(flat_place, at + c)
            for c in range(0, width, LINE_BYTES // x.itemsize):
                prefetch(flat_shared, at + c)
            i = indices[e]
            part = shared[i]
            if unclear[i]:
                top = best[i]
                for c in range(width):
                    value = part[c]
                    into[c] += value if own[c] == top[c] else zero
            else:
                here, this = place[i], number[e]
                for c in range(width):
                    value = part[c]
                    into[c] += value if here[c] == this else zero


def _numbers(adj: Adjacency) -> Tensor:
    r"""uint8 ``[E]`` in the order of the transpose: which of its destination's edges each is, up to 255."""

    def build() -> Tensor:
        first = (
            adj.indptr[:-1].to(adj.indices.dtype).repeat_interleave(adj.degrees, output_size=adj.num_edges)
        )
        number = (torch.arange(adj.num_edges, dtype=first.dtype) - first).clamp_(max=UNTOLD).to(torch.uint8)
        return number.index_select(0, adj.transpose_order)

    numbers: Tensor = adj._keep("edge numbers", build)
    return numbers


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
            place = torch.empty(out.shape, dtype=torch.uint8)
            unclear = torch.empty(adj.num_dst, dtype=torch.uint8)
            for_rows(_extreme_rows_placed, indptr, columns, (*args, _flat(place, columns), unclear.numpy()))
            out = out.to(x.dtype)
            ctx.adj = adj
            ctx.save_for_backward(x, out, place, unclear)
            return out
        for_rows(_extreme_rows, indptr, columns, args)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        x, out, place, unclear = ctx.saved_tensors
        x, out, shared = accumulating(x), accumulating(out), accumulating(grad)
        columns = math.prod(x.shape[1:])
        indptr, indices = ctx.adj.indptr.numpy(), ctx.adj.indices.numpy()
        if bool(unclear.any()):
            shared = shared.clone() if shared.data_ptr() == grad.data_ptr() else shared
            rows = (_flat(x, columns), _flat(out, columns), unclear.numpy(), _flat(shared, columns))
            for_rows(_share_rows, indptr, columns, (indptr, indices, *rows))
        there, grad_x = ctx.adj.transposed, torch.empty_like(x)
        by_row = [_flat(part, columns) for part in (place, out, shared, x, grad_x)]
        args = (there.indptr.numpy(), there.indices.numpy(), _numbers(ctx.adj).numpy())
        for_rows(_give_rows, there.indptr.numpy(), columns, (*args, by_row[0], unclear.numpy(), *by_row[1:]))
        return None, grad_x.to(grad.dtype), None
