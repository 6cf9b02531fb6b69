r"""Compiled steps of optimisers on some rows of a table. Entry by entry they are torch's formulas, in the dtype of the
table: sums are never reordered or fused, so that no number of workers or threads changes a bit.

All take ``lo, hi`` (the slots to work on), ``weight`` and further state ``[num_rows, C]``, ``touched`` int32 ``[slots]``
(the row of each slot) and ``grads`` ``[slots, C]``. Scalars must be of the dtype of ``weight``. Loops that divide do not
look for zeros, as numpy does not: with a way out for errors they would not run on vectors.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from partpar.kernels.prefetch import prefetch

_AHEAD, _LINE_BYTES = 4, 64


@njit(nogil=True, cache=True)
def scale_sums(lo: int, hi: int, grads: np.ndarray, counts: np.ndarray, mean: bool, scale: np.floating) -> None:
    r"""Multiplies sums by :obj:`scale` and, if asked, divides each by the number of its values."""
    for slot in range(lo, hi):
        factor = scale / counts[slot] if mean else scale
        for c in range(grads.shape[1]):
            grads[slot, c] *= grads.dtype.type(factor)


@njit(nogil=True, cache=True)
def sgd_rows(
    lo: int, hi: int, weight: np.ndarray, touched: np.ndarray, grads: np.ndarray, lr: np.floating
) -> None:
    r""":class:`torch.optim.SGD`."""
    width, flat, line = weight.shape[1], weight.reshape(-1), _LINE_BYTES // weight.itemsize
    for slot in range(lo, hi):
        ahead = np.int64(touched[min(slot + _AHEAD, hi - 1)]) * width
        for c in range(0, width, line):
            prefetch(flat, ahead + c)
        row = touched[slot]
        for c in range(width):
            weight[row, c] -= lr * grads[slot, c]


@njit(nogil=True, cache=True, error_model="numpy")
def adagrad_rows(
    lo: int, hi: int, weight: np.ndarray, squares: np.ndarray, touched: np.ndarray, grads: np.ndarray,
    lr: np.floating, eps: np.floating,
) -> None:  # fmt: skip
    r""":class:`torch.optim.Adagrad` (Duchi et al., JMLR 2011)."""
    width, line = weight.shape[1], _LINE_BYTES // weight.itemsize
    flat, flat_squares = weight.reshape(-1), squares.reshape(-1)
    for slot in range(lo, hi):
        ahead = np.int64(touched[min(slot + _AHEAD, hi - 1)]) * width
        for c in range(0, width, line):
            prefetch(flat, ahead + c)
            prefetch(flat_squares, ahead + c)
        row = touched[slot]
        for c in range(width):
            g = grads[slot, c]
            squares[row, c] += g * g
            weight[row, c] -= lr * (g / (math.sqrt(squares[row, c]) + eps))


@njit(nogil=True, cache=True, error_model="numpy")
def adam_rows(
    lo: int, hi: int, weight: np.ndarray, means: np.ndarray, squares: np.ndarray, touched: np.ndarray,
    grads: np.ndarray, step_size: np.floating, keep_1: np.floating, keep_2: np.floating, eps: np.floating,
) -> None:  # fmt: skip
    r""":class:`torch.optim.SparseAdam`; ``keep_i`` is one less ``beta_i``."""
    width, line = weight.shape[1], _LINE_BYTES // weight.itemsize
    flat, flat_means, flat_squares = weight.reshape(-1), means.reshape(-1), squares.reshape(-1)
    for slot in range(lo, hi):
        ahead = np.int64(touched[min(slot + _AHEAD, hi - 1)]) * width
        for c in range(0, width, line):
            prefetch(flat, ahead + c)
            prefetch(flat_means, ahead + c)
            prefetch(flat_squares, ahead + c)
        row = touched[slot]
        for c in range(width):
            g = grads[slot, c]
            mean = means[row, c] + (g - means[row, c]) * keep_1
            square = squares[row, c] + (g * g - squares[row, c]) * keep_2
            means[row, c], squares[row, c] = mean, square
            weight[row, c] -= step_size * (mean / (math.sqrt(square) + eps))


@njit(nogil=True, cache=True)
def forget_slots(touched: np.ndarray, num_touched: int, slot_of: np.ndarray) -> None:
    r"""Takes the slots back that :func:`partpar.kernels.table.sum_by_row` gave."""
    for slot in range(num_touched):
        slot_of[touched[slot]] = 0
