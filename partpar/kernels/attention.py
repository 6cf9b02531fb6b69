r"""Softmax over in-edges and the sum that it weighs, in one pass over the rows each way.

Per destination ``i`` and head ``h`` with logits ``l_e``: ``out = sum of softmax(l)_e * scale_e * x[src(e)]``.
The softmax is taken online (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018); only
its log-normaliser ``[num_dst, H]`` is kept, and the backward pass computes the probabilities anew from it, as
in Dao et al., "FlashAttention" (2022). With ``p_e = softmax(l)_e`` and ``d_e = scale_e * <grad[i],
x[src(e)]>``, the gradient of a logit is ``p_e * (d_e - <grad[i], out[i]>)``.

A logit is ``leaky_relu(a_src[src] + a_dst[dst] + a_edge[e])``; an ``a_edge`` without rows counts as zero, as
a ``scale`` without rows counts as one, and a slope of one makes the ``leaky_relu`` the identity.
"""

import numpy as np
from numba import njit

from partpar.kernels.exponential import exponential
from partpar.kernels.prefetch import prefetch
from partpar.kernels.rows import AHEAD, LINE_BYTES

# Edges of one destination are handled in blocks: the scratch stays in the cache whatever the degree.
BLOCK = 128

FAST = {"reassoc", "contract", "nsz", "arcp"}


@njit(nogil=True, cache=True, fastmath=FAST)
def attend_rows(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    x: np.ndarray,
    a_src: np.ndarray,
    a_dst: np.ndarray,
    a_edge: np.ndarray,
    slope: float,
    scale: np.ndarray,
    out: np.ndarray,
    norm: np.ndarray,
) -> None:
    r"""Writes ``out[i]`` and the log-normalisers ``norm[i]``; both zero in rows without edges."""
    heads, width, last = x.shape[1], x.shape[2], indices.shape[0] - 1
    flat = x.reshape(-1)
    zero = x.dtype.type(0)
    # [BLOCK, heads] in one run: rows are short, and a vector of exponentials spans several edges.
    prob = np.empty(BLOCK * heads, x.dtype)
    top, peak, total = np.empty(heads, x.dtype), np.empty(heads, x.dtype), np.empty(heads, x.dtype)
    for i in range(lo, hi):
        out[i] = 0
        norm[i] = 0
        start, end = indptr[i], indptr[i + 1]
        if start == end:
            continue
        peak[:] = -np.inf
        total[:] = 0
        for first in range(start, end, BLOCK):
            size = min(BLOCK, end - first)
            top[:] = peak
            for k in range(size):
                e = first + k
                j = indices[e]
                for h in range(heads):
                    logit = a_src[j, h] + a_dst[i, h]
                    if a_edge.shape[0]:
                        logit += a_edge[e, h]
                    logit = logit if logit > zero else slope * logit
                    prob[k * heads + h] = logit
                    peak[h] = logit if logit > peak[h] else peak[h]
            for h in range(heads):
                if (
                    first > start and peak[h] > top[h]
                ):  # what was summed so far was scaled by a smaller maximum
                    factor = exponential(top[h] - peak[h])
                    total[h] *= factor
                    for c in range(width):
                        out[i, h, c] *= factor
                top[h] = peak[h] if peak[h] > -np.inf else zero
            for k in range(size):
                for h in range(heads):
                    prob[k * heads + h] -= top[h]
            for k in range(size * heads):
                prob[k] = exponential(prob[k])
            for k in range(size):
                e = first + k
                at = np.int64(indices[min(e + AHEAD, last)]) * heads * width
                for c in range(0, heads * width, LINE_BYTES // x.itemsize):
                    prefetch(flat, at + c)
                j = indices[e]
                for h in range(heads):
                    weight = prob[k * heads + h]
                    total[h] += weight
                    if scale.shape[0]:
                        weight *= scale[e, h]
                    into, row = out[i, h], x[j, h]
                    for c in range(width):
                        into[c] += weight * row[c]
        for h in range(heads):
            for c in range(width):
                out[i, h, c] /= total[h]
            norm[i, h] = peak[h] + np.log(total[h])


@njit(nogil=True, cache=True, fastmath=FAST)
def attend_rows_backward(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    order: np.ndarray,
    x: np.ndarray,
    a_src: np.ndarray,
    a_dst: np.ndarray,
    a_edge: np.ndarray,
    slope: float,
    scale: np.ndarray,
    norm: np.ndarray,
    g: np.ndarray,
    g_out: np.ndarray,
    grad_x: np.ndarray,
    grad_src: np.ndarray,
    grad_edge: np.ndarray,
    grad_dst: np.ndarray,
) -> None:
    r"""All gradients, over the transpose: rows are sources ``j``, and entry ``e`` is edge ``order[e]``.

    ``g_out[i, h] = <g[i, h], out[i, h]>``. ``grad_dst`` is this thread's own: destinations meet in many rows.
    """
    heads, width, last = x.shape[1], x.shape[2], indices.shape[0] - 1
    flat = g.reshape(-1)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    prob, bend = np.empty(BLOCK * heads, x.dtype), np.empty(BLOCK * heads, x.dtype)
    for j in range(lo, hi):
        grad_x[j] = 0
        grad_src[j] = 0
        end = indptr[j + 1]
        for first in range(indptr[j], end, BLOCK):
            size = min(BLOCK, end - first)
            for k in range(size):
                i = indices[first + k]
                for h in range(heads):
                    logit = a_src[j, h] + a_dst[i, h]
                    if a_edge.shape[0]:
                        logit += a_edge[order[first + k], h]
                    factor = one if logit > zero else slope
                    bend[k * heads + h] = factor
                    prob[k * heads + h] = factor * logit - norm[i, h]
            for k in range(size * heads):
                prob[k] = exponential(prob[k])
            for k in range(size):
                e = first + k
                at = np.int64(indices[min(e + AHEAD, last)]) * heads * width
                for c in range(0, heads * width, LINE_BYTES // x.itemsize):
                    prefetch(flat, at + c)
                i = indices[e]
                for h in range(heads):
                    factor = scale[order[e], h] if scale.shape[0] else one
                    weight = prob[k * heads + h] * factor
                    row, own, into = g[i, h], x[j, h], grad_x[j, h]
                    dot = zero
                    for c in range(width):  # one loop for both, so that a row is loaded once
                        value = row[c]
                        dot += value * own[c]
                        into[c] += weight * value
                    grad_logit = prob[k * heads + h] * (factor * dot - g_out[i, h]) * bend[k * heads + h]
                    grad_src[j, h] += grad_logit
                    grad_dst[i, h] += grad_logit
                    if grad_edge.shape[0]:
                        grad_edge[order[e], h] = grad_logit


@njit(nogil=True, cache=True, fastmath=FAST)
def dot_same_rows(lo: int, hi: int, left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    r"""``out[i, h] = <left[i, h], right[i, h]>``."""
    for i in range(lo, hi):
        for h in range(left.shape[1]):
            one, other = left[i, h], right[i, h]
            total = left.dtype.type(0)
            for c in range(left.shape[2]):
                total += one[c] * other[c]
            out[i, h] = total
