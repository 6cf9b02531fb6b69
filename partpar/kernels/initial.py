r"""Compiled filling of rows with counter-based numbers: an entry depends on the seed, its row's id and its column."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from partpar.kernels.counter import absorb, draw

_U_11 = np.uint64(11)
_UNIT = 2.0**-53


@njit(nogil=True, cache=True)
def fill_uniform(out: np.ndarray, ids: np.ndarray, key: np.uint64, low: float, high: float) -> None:
    r"""``out[i]`` uniform in ``[low, high)`` for the row ``ids[i]``."""
    for i in range(out.shape[0]):
        row = absorb(key, np.uint64(ids[i]))
        for c in range(out.shape[1]):
            out[i, c] = low + (high - low) * (float(draw(row, np.uint64(c)) >> _U_11) * _UNIT)


@njit(nogil=True, cache=True)
def fill_normal(out: np.ndarray, ids: np.ndarray, key: np.uint64, mean: float, std: float) -> None:
    r"""``out[i]`` normal for the row ``ids[i]`` (Box and Muller, 1958; two draws an entry, no pair kept)."""
    for i in range(out.shape[0]):
        row = absorb(key, np.uint64(ids[i]))
        for c in range(out.shape[1]):
            # 1 - u lies in (0, 1]: its logarithm is finite.
            u = 1.0 - float(draw(row, np.uint64(2 * c)) >> _U_11) * _UNIT
            v = float(draw(row, np.uint64(2 * c + 1)) >> _U_11) * _UNIT
            out[i, c] = mean + std * (math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v))
