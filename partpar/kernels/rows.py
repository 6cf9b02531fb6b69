r"""Compiled loops of the linear aggregations. All take compressed rows and add nothing of the size of the
edges.

Arrays: ``indptr`` int64 ``[n + 1]``, ``indices`` int32 ``[E]``, ``x`` ``[m, H, C]``, ``weight`` ``[E, H]``.
Each body handles the rows ``lo..hi-1`` (see :mod:`partpar.kernels.threads`).
"""

import numpy as np
from numba import njit

from partpar.kernels.prefetch import prefetch

# How many edges ahead a row is asked for (measured; 4 and 32 are slower), and the bytes of a cache line.
AHEAD = 8
LINE_BYTES = 64

# Sums may be reordered and fused, but infinities and NaN mean what they mean.
FAST = {"reassoc", "contract", "nsz", "arcp"}


@njit(nogil=True, cache=True, fastmath=FAST)
def add_rows(
    lo: int, hi: int, indptr: np.ndarray, indices: np.ndarray, x: np.ndarray, out: np.ndarray
) -> None:
    r"""``out[i] += sum of x[indices[e]]`` over the edges of row ``i``; ``x`` is ``[m, C]``."""
    width = x.shape[1]
    flat = x.reshape(-1)
    last = indices.shape[0] - 1
    for i in range(lo, hi):
        into = out[i]
        e, end = indptr[i], indptr[i + 1]
        while e + 2 <= end:  # two at a time: `into` is loaded and stored half as often
            for ahead in range(e + AHEAD, e + AHEAD + 2):
                at = np.int64(indices[min(ahead, last)]) * width
                for c in range(0, width, LINE_BYTES // x.itemsize):
                    prefetch(flat, at + c)
            first, second = x[indices[e]], x[indices[e + 1]]
            for c in range(width):
                into[c] += first[c] + second[c]
            e += 2
        if e < end:
            row = x[indices[e]]
            for c in range(width):
                into[c] += row[c]


@njit(nogil=True, cache=True, fastmath=FAST)
def add_weighted_rows(
    lo: int,
    hi: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    weight: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
) -> None:
    r"""``out[i, h] += sum of weight[e, h] * x[indices[e], h]`` over the edges of row ``i``."""
    heads, width = x.shape[1], x.shape[2]
    flat = x.reshape(-1)
    last = indices.shape[0] - 1
    for i in range(lo, hi):
        for e in range(indptr[i], indptr[i + 1]):
            at = np.int64(indices[min(e + AHEAD, last)]) * heads * width
            for c in range(0, heads * width, LINE_BYTES // x.itemsize):
                prefetch(flat, at + c)
            j = indices[e]
            for h in range(heads):
                into, row, factor = out[i, h], x[j, h], weight[e, h]
                for c in range(width):
                    into[c] += factor * row[c]


@njit(nogil=True, cache=True, fastmath=FAST)
def dot_rows(
    lo: int, hi: int, indptr: np.ndarray, indices: np.ndarray, g: np.ndarray, x: np.ndarray, out: np.ndarray
) -> None:
    r"""``out[e, h] = <g[i, h], x[indices[e], h]>`` for the edges of row ``i``: the gradient of a weighted
    sum's weights.
    """
    heads, width = x.shape[1], x.shape[2]
    flat = x.reshape(-1)
    last = indices.shape[0] - 1
    for i in range(lo, hi):
        for e in range(indptr[i], indptr[i + 1]):
            at = np.int64(indices[min(e + AHEAD, last)]) * heads * width
            for c in range(0, heads * width, LINE_BYTES // x.itemsize):
                prefetch(flat, at + c)
            j = indices[e]
            for h in range(heads):
                left, right = g[i, h], x[j, h]
                total = left[0] * right[0]
                for c in range(1, width):
                    total += left[c] * right[c]
                out[e, h] = total
