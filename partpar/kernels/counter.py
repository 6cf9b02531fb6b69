r"""Counter-based random numbers: a draw is a function of *what* it is for, never of when or where it is made.

The bits for (seed, step, layer, raw id, column) come from a chain of 64-bit finalisers, in the spirit of
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): the first three words are absorbed
into a key, the raw id gives each row a stream of its own, and the column is the position in that SplitMix64
stream (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014). So any worker, in any
order, on any device, draws the same bits for the same row.

The compiled functions take and return ``uint64`` scalars and may be called from other kernels.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from partpar.kernels.bits import MUL_1, MUL_2, WEYL, bits, key, shift, signed
from partpar.kernels.bits import mix as mix_words

_U_WEYL, _U_MUL_1, _U_MUL_2 = np.uint64(WEYL), np.uint64(MUL_1), np.uint64(MUL_2)
_U_11, _U_27, _U_30, _U_31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)

# Random bits that a dtype's [0, 1) can hold evenly spaced, without rounding up to 1.
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@numba.njit(inline="always")
def mix(word: np.uint64) -> np.uint64:
    """A bijection of 64-bit words in which every input bit reaches every output bit."""
    word = (word ^ (word >> _U_30)) * _U_MUL_1
    word = (word ^ (word >> _U_27)) * _U_MUL_2
    return word ^ (word >> _U_31)


@numba.njit(inline="always")
def absorb(state: np.uint64, word: np.uint64) -> np.uint64:
    """Takes one more word into a state."""
    return mix((state ^ word) + _U_WEYL)


@numba.njit(inline="always")
def draw(row: np.uint64, column: np.uint64) -> np.uint64:
    """The 64 random bits of a column; ``row`` is ``absorb(key, raw id)``."""
    return mix(row + (column + np.uint64(1)) * _U_WEYL)


@numba.njit(nogil=True, cache=True)
def _fill_uniform(lo: int, hi: int, out: np.ndarray, ids: np.ndarray, key: np.uint64, digits: int) -> None:
    shift, scale = np.uint64(64 - digits), 2.0**-digits
    for i in range(lo, hi):
        row = absorb(key, np.uint64(ids[i]))
        for column in range(out.shape[1]):
            out[i, column] = float(draw(row, np.uint64(column)) >> shift) * scale


@numba.njit(nogil=True, cache=True)
def _fill_below(
    lo: int, hi: int, out: np.ndarray, ids: np.ndarray, key: np.uint64, threshold: np.uint64
) -> None:
    for i in range(lo, hi):
        row = absorb(key, np.uint64(ids[i]))
        for column in range(out.shape[1]):
            out[i, column] = (draw(row, np.uint64(column)) >> _U_11) < threshold


def uniform(
    seed: int, step: int, layer: int, ids: Tensor, num_columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Uniform numbers in ``[0, 1)``.

    Args:
        seed, step, layer: Any integers; 64 bits of each count.
        ids: ``[N]`` int64, the raw id of each row.
        num_columns: Draws for each row.
        dtype: A floating dtype. All multiples of ``2 ** -digits`` are equally likely, where digits are 53,
            24, 11 and 8 for float64, float32, float16 and bfloat16; 0 is one of them and 1 is not.

    Returns:
        ``[N, num_columns]`` on the device of :obj:`ids`; the same bits on every device.
    """
    _check(ids, num_columns)
    if dtype not in _DIGITS:
        raise ValueError(
            f"expected a dtype of {', '.join(map(str, _DIGITS))} for uniform numbers, found {dtype}"
        )
    digits = _DIGITS[dtype]
    if ids.device.type == "cpu":
        out = torch.empty((ids.numel(), num_columns), dtype=dtype if digits > 11 else torch.float32)
        _fill_uniform(
            0, ids.numel(), out.numpy(), ids.contiguous().numpy(), np.uint64(key(seed, step, layer)), digits
        )
        return out.to(dtype)
    drawn = bits(key(seed, step, layer), ids, num_columns)
    return (shift(drawn, 64 - digits).to(torch.float64) * 2.0**-digits).to(dtype)


def below(p: float, seed: int, step: int, layer: int, ids: Tensor, num_columns: int) -> Tensor:
    r"""Which of the draws of :func:`uniform` (in float64) are less than :obj:`p`: true with probability
    :obj:`p`.

    Args:
        p: In ``[0, 1]``.
        seed, step, layer, ids, num_columns: As for :func:`uniform`.

    Returns:
        ``[N, num_columns]`` bool on the device of :obj:`ids`.
    """
    _check(ids, num_columns)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"expected a probability in [0, 1], found {p}")
    threshold = math.ceil(p * 2.0**53)
    if ids.device.type == "cpu":
        out = torch.empty((ids.numel(), num_columns), dtype=torch.bool)
        _fill_below(
            0,
            ids.numel(),
            out.numpy(),
            ids.contiguous().numpy(),
            np.uint64(key(seed, step, layer)),
            np.uint64(threshold),
        )
        return out
    return shift(bits(key(seed, step, layer), ids, num_columns), 11) < threshold


def pair_ids(first: Tensor, second: Tensor) -> Tensor:
    r"""One 64-bit id for each ordered pair of ids, for draws that belong to edges. Two of n pairs share an id
    with probability ``n**2 / 2**65``: nowhere below a billion edges would one expect it.

    Args:
        first, second: ``[N]`` int64.

    Returns:
        ``[N]`` int64.
    """
    return mix_words((mix_words(first + signed(WEYL)) ^ second) + signed(WEYL))


def _check(ids: Tensor, num_columns: int) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"expected one-dimensional int64 ids, found {ids.dtype} of shape {tuple(ids.shape)}")
    if num_columns < 0:
        raise ValueError(f"expected a number of columns of at least 0, found {num_columns}")
