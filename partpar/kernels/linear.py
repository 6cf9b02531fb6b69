r"""Sums over in-edges as functions that autograd knows: linear in rows, and bilinear in rows and edge
weights.

Each derivative is one of the same two functions, on the adjacency or its transpose, so that derivatives of
any order exist. No tensor of the size ``[E, C]`` is made.
"""

import math
from typing import Any

import torch
from torch import Tensor

from partpar.kernels.adjacency import Adjacency
from partpar.kernels.rows import add_rows, add_weighted_rows, dot_rows
from partpar.kernels.threads import for_rows

# `embedding_bag` sums these row types in float32 with a kernel made for the processor at hand; on float64 it
# is slow.
BAG_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weighted_sum(adj: Adjacency, x: Tensor, weight: Tensor | None) -> Tensor:
    r"""``out[i] = sum of weight[e] * x[src(e)]`` over the edges ``e`` into ``i``.

    Args:
        adj (Adjacency): The edges.
        x (Tensor): ``[num_src, C]`` or ``[num_src, H, C]``, contiguous.
        weight (Tensor, optional): ``[E, H]`` or ``[E, 1]``, contiguous, in the dtype of :obj:`x`.

    Returns:
        Tensor ``[num_dst, C]`` or ``[num_dst, H, C]``.
    """
    out: Tensor = _WeightedSum.apply(adj, x, weight)
    return out


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, adj: Adjacency, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.adj = adj
        # Rows are needed only to differentiate the weights, which most often are constant.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        return sum_into(adj, x, weight, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return None, *_gradients(ctx.adj, ctx.needs_input_grad[1:], grad, x, weight)


class _AddWeightedSum(torch.autograd.Function):
    # `base` comes first: where it is a view, autograd takes the first input for the one that is changed in
    # place.
    @staticmethod
    def forward(ctx: Any, base: Tensor, adj: Adjacency, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.adj = adj
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight)
        ctx.mark_dirty(base)
        sum_into(adj, x, weight, base.detach())
        return base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return grad, None, *_gradients(ctx.adj, ctx.needs_input_grad[2:], grad, x, weight)


class _SumAndHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, adj: Adjacency, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.adj = adj
        return sum_into(adj, x, None, None), x[: adj.num_dst].clone()

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, grad_head: Tensor) -> tuple[None, Tensor]:
        grad = weighted_sum(ctx.adj.transposed, grad_sum.contiguous(), None)
        grad[: ctx.adj.num_dst] += grad_head
        return None, grad


def sum_and_head(adj: Adjacency, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""The unweighted sum, and the rows of the destinations, which are the first sources. Taken by a slice, their gradient
    would be a second matrix of all sources, nearly all zeros, to be added to that of the sum."""
    both: tuple[Tensor, Tensor] = _SumAndHead.apply(adj, x)
    return both


def _gradients(
    adj: Adjacency, wanted: tuple[bool, ...], grad: Tensor, x: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    grad = grad.contiguous()
    if wanted[0]:
        grad_x = weighted_sum(adj.transposed, grad, None if weight is None else adj.to_transpose(weight))
    if wanted[1]:
        assert weight is not None
        assert x is not None
        grad_weight = edge_dot(adj, grad, x)
        if weight.size(1) != grad_weight.size(1):  # one weight for all heads
            grad_weight = grad_weight.sum(1, keepdim=True)
    return grad_x, grad_weight


def add_weighted_sum(adj: Adjacency, x: Tensor, weight: Tensor | None, base: Tensor) -> Tensor:
    r"""``base += weighted_sum(adj, x, weight)`` in place, touching only rows that have edges; differentiable.

    :obj:`base` is contiguous and of the sum's shape and dtype.
    """
    out: Tensor = _AddWeightedSum.apply(base, adj, x, weight)
    return out


def edge_dot(adj: Adjacency, g: Tensor, x: Tensor) -> Tensor:
    r"""``out[e, h] = <g[dst(e), h], x[src(e), h]>``: ``[E, H]`` from ``[num_dst, H, C]`` and ``[num_src, H,
    C]``.

    Rows without heads have one.
    """
    out: Tensor = _EdgeDot.apply(adj, g, x)
    return out


class _EdgeDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, adj: Adjacency, g: Tensor, x: Tensor) -> Tensor:
        ctx.adj = adj
        ctx.save_for_backward(g, x)
        g, x = _with_heads(g), _with_heads(x)
        heads, width = x.shape[1:]
        if g.device.type != "cpu":
            rows = adj.destinations
            return (g.index_select(0, rows) * x.index_select(0, adj.indices)).sum(-1)
        if min(heads, width) == 0:
            return x.new_zeros(adj.num_edges, heads)
        wide, narrow = accumulating(x), x.dtype
        out = torch.empty(adj.num_edges, heads, dtype=wide.dtype)
        for_rows(
            dot_rows,
            adj.indptr.numpy(),
            heads * width,
            (adj.indptr.numpy(), adj.indices.numpy(), accumulating(g).numpy(), wide.numpy(), out.numpy()),
        )
        return out.to(narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        grad = grad.contiguous()
        grad_g = weighted_sum(ctx.adj, x, grad) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[2]:
            grad_x = weighted_sum(ctx.adj.transposed, g, ctx.adj.to_transpose(grad))
        return None, grad_g, grad_x


def accumulating(x: Tensor) -> Tensor:
    r"""Detached, contiguous, and in a dtype that sums are taken in: float32 for 16-bit rows, else its own."""
    x = x.detach().contiguous()
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x


def _with_heads(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 2 else x


def sum_into(adj: Adjacency, x: Tensor, weight: Tensor | None, base: Tensor | None) -> Tensor:
    r"""The value of :func:`weighted_sum`, added in place to :obj:`base` if one is given."""
    shape = (adj.num_dst, *x.shape[1:])
    columns = math.prod(shape[1:])
    if adj.num_edges == 0 or columns == 0:
        return x.new_zeros(shape) if base is None else base
    x = x.detach()
    weight = None if weight is None else weight.detach()
    if x.device.type != "cpu":
        out = _sum_on_device(adj, _with_heads(x), weight).resize_(shape)
        return out if base is None else base.add_(out)
    one_weight = weight is None or weight.size(1) == 1
    if base is None and x.dtype in BAG_DTYPES and one_weight:
        # No view: autograd refuses to add to a view of a custom function's output in place.
        return _sum_in_bags(adj, x.view(adj.num_src, columns), weight).resize_(shape)

    wide = accumulating(x)
    # `to` gives the base itself if it has that dtype.
    out = torch.zeros(shape, dtype=wide.dtype) if base is None else base.to(wide.dtype)
    heads = 1 if one_weight else x.size(1)
    rows, into = wide.view(-1, heads, columns // heads).numpy(), out.view(-1, heads, columns // heads).numpy()
    indptr, indices = adj.indptr.numpy(), adj.indices.numpy()
    if weight is None:
        for_rows(add_rows, indptr, columns, (indptr, indices, rows[:, 0], into[:, 0]))
    else:
        for_rows(
            add_weighted_rows, indptr, columns, (indptr, indices, accumulating(weight).numpy(), rows, into)
        )
    if base is None:
        return out.to(x.dtype)
    return base if out is base else base.copy_(out)


def _sum_in_bags(adj: Adjacency, x: Tensor, weight: Tensor | None) -> Tensor:
    indices = adj.indices.to(adj.offsets.dtype)  # both in 32 bits, unless there are 2**31 edges
    return torch._embedding_bag_forward_only(
        x, indices, adj.offsets, False, 0, False, None if weight is None else weight.reshape(-1), True
    )[0]


def _sum_on_device(adj: Adjacency, x: Tensor, weight: Tensor | None) -> Tensor:
    r"""By the sparse product of torch where all columns share a weight, else head by head."""
    heads, width = x.shape[1:]
    if weight is not None and weight.size(1) > 1:
        parts = [_sum_on_device(adj, x[:, h : h + 1], weight[:, h : h + 1]) for h in range(heads)]
        return torch.stack(parts, 1)
    wide = x.reshape(-1, heads * width)
    wide = wide.to(torch.float32) if wide.dtype in (torch.bfloat16, torch.float16) else wide
    matrix = adj.torch_csr(wide.dtype)
    if weight is not None:
        matrix = torch.sparse_csr_tensor(
            matrix.crow_indices(),
            matrix.col_indices(),
            weight.reshape(-1).to(wide.dtype),
            size=matrix.shape,
            check_invariants=False,
        )
    return (matrix @ wide).to(x.dtype)
