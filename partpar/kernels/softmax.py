r"""Attention over in-edges as a function that autograd knows: the kernels of
:mod:`partpar.kernels.attention`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from partpar.kernels.adjacency import Adjacency
from partpar.kernels.attention import attend_rows, attend_rows_backward, dot_same_rows
from partpar.kernels.linear import accumulating
from partpar.kernels.threads import for_rows, num_workers


def attend(
    adj: Adjacency,
    x: Tensor,
    a_src: Tensor | None,
    a_dst: Tensor | None,
    a_edge: Tensor | None,
    slope: float,
    scale: Tensor | None,
) -> Tensor:
    r"""``out[i] = sum of softmax(leaky_relu(a_src[src(e)] + a_dst[i] + a_edge[e])) * scale[e] * x[src(e)]``.

    Args:
        adj (Adjacency): The edges.
        x (Tensor): ``[num_src, H, C]``, contiguous; all others are of its dtype.
        a_src (Tensor, optional): ``[num_src, H]``.
        a_dst (Tensor, optional): ``[num_dst, H]``.
        a_edge (Tensor, optional): ``[E, H]``.
        slope (float): The slope of the ``leaky_relu`` below zero; one for none at all.
        scale (Tensor, optional): ``[E, H]``, a constant.

    Returns:
        Tensor ``[num_dst, H, C]``; zero for destinations without in-edges.
    """
    if x.device.type != "cpu":
        return attend_by_scatter(adj, x, a_src, a_dst, a_edge, slope, scale)
    out: Tensor = _Attend.apply(adj, x, a_src, a_dst, a_edge, slope, scale)
    return out


def attend_by_scatter(
    adj: Adjacency,
    x: Tensor,
    a_src: Tensor | None,
    a_dst: Tensor | None,
    a_edge: Tensor | None,
    slope: float,
    scale: Tensor | None,
) -> Tensor:
    r"""The same in torch operations alone, for devices without a kernel here. Makes messages ``[E, H,
    C]``.
    """
    src, dst = adj.indices, adj.destinations
    logit = x.new_zeros(adj.num_edges, x.size(1))
    for values, index in ((a_src, src), (a_dst, dst), (a_edge, None)):
        if values is not None:
            logit = logit + (values if index is None else values.index_select(0, index))
    logit = torch.nn.functional.leaky_relu(logit, slope)
    rows = dst.to(torch.int64).view(-1, 1).expand_as(logit)
    zeros = logit.new_zeros(adj.num_dst, x.size(1))
    top = zeros.scatter_reduce(0, rows, logit.detach(), "amax", include_self=False)
    prob = (logit - top.index_select(0, dst)).exp()
    prob = prob / zeros.index_add(0, dst, prob).index_select(0, dst)
    prob = prob if scale is None else prob * scale
    return x.new_zeros(adj.num_dst, *x.shape[1:]).index_add(
        0, dst, x.index_select(0, src) * prob.unsqueeze(-1)
    )


def _arrays(
    adj: Adjacency,
    wide: Tensor,
    a_src: Tensor | None,
    a_dst: Tensor | None,
    a_edge: Tensor | None,
    slope: float,
    scale: Tensor | None,
) -> tuple[Any, ...]:
    r"""What both kernels are given of the logits: node terms always (zeros for none), edge terms if there
    are any.
    """
    heads = wide.size(1)
    src = wide.new_zeros(adj.num_src, heads) if a_src is None else accumulating(a_src)
    dst = wide.new_zeros(adj.num_dst, heads) if a_dst is None else accumulating(a_dst)
    edge, factor = (
        wide.new_empty(0, heads) if part is None else accumulating(part) for part in (a_edge, scale)
    )
    return src.numpy(), dst.numpy(), edge.numpy(), src.numpy().dtype.type(slope), factor.numpy()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        adj: Adjacency,
        x: Tensor,
        a_src: Tensor | None,
        a_dst: Tensor | None,
        a_edge: Tensor | None,
        slope: float,
        scale: Tensor | None,
    ) -> Tensor:
        wide = accumulating(x)
        out = torch.empty(adj.num_dst, *x.shape[1:], dtype=wide.dtype)
        norm = torch.empty(adj.num_dst, x.size(1), dtype=wide.dtype)
        indptr = adj.indptr.numpy()
        for_rows(
            attend_rows,
            indptr,
            x.size(1) * x.size(2),
            (
                indptr,
                adj.indices.numpy(),
                wide.numpy(),
                *_arrays(adj, wide, a_src, a_dst, a_edge, slope, scale),
                out.numpy(),
                norm.numpy(),
            ),
        )
        out = out.to(x.dtype)
        ctx.adj, ctx.slope = adj, slope
        ctx.save_for_backward(x, a_src, a_dst, a_edge, scale, out, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_src, a_dst, a_edge, scale, out, norm = ctx.saved_tensors
        adj: Adjacency = ctx.adj
        wide, g, out = accumulating(x), accumulating(grad), accumulating(out)
        heads, width = x.shape[1:]

        g_out = torch.empty_like(norm)
        for_rows(
            dot_same_rows, np.arange(adj.num_dst + 1), heads * width, (g.numpy(), out.numpy(), g_out.numpy())
        )

        there = adj.transposed
        indptr = there.indptr.numpy()
        grad_x, grad_src = torch.empty_like(wide), wide.new_empty(adj.num_src, heads)
        grad_edge = wide.new_empty(0 if a_edge is None else adj.num_edges, heads)
        # Several rows of the transpose meet in one destination: each thread sums for itself.
        grad_dst = wide.new_zeros(
            num_workers((adj.num_edges + adj.num_src) * heads * width), adj.num_dst, heads
        )
        for_rows(
            attend_rows_backward,
            indptr,
            heads * width,
            (
                indptr,
                there.indices.numpy(),
                adj.transpose_order.numpy(),
                wide.numpy(),
                *_arrays(adj, wide, a_src, a_dst, a_edge, ctx.slope, scale),
                norm.numpy(),
                g.numpy(),
                g_out.numpy(),
                grad_x.numpy(),
                grad_src.numpy(),
                grad_edge.numpy(),
            ),
            per_worker=[part.numpy() for part in grad_dst],
        )
        return (
            None,
            grad_x.to(x.dtype),
            None if a_src is None else grad_src.to(x.dtype),
            None if a_dst is None else grad_dst.sum(0).to(x.dtype),
            None if a_edge is None else grad_edge.to(x.dtype),
            None,
            None,
        )
