r"""Rows of different lengths, stored one behind the other."""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor


@njit(nogil=True, cache=True)
def _starts(counts: np.ndarray, starts: np.ndarray) -> int:
    total = 0
    for row in range(counts.shape[0]):
        starts[row] = total
        total += counts[row]
    return total


@njit(nogil=True, cache=True)
def _place(
    index: np.ndarray, counts: np.ndarray, starts: np.ndarray, columns: np.ndarray, out: np.ndarray
) -> None:
    at = 0
    for i in range(index.shape[0]):
        to = starts[index[i]]
        for j in range(counts[i]):
            out[to + j] = columns[at + j]
        at += counts[i]


def interleave(
    pieces: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    index: Sequence[Tensor],
    num_rows: int,
) -> tuple[list[Tensor], Tensor]:
    r"""Puts ragged rows that came in several pieces into one order.

    Args:
        pieces: For each piece its columns, each ``[sum(counts)]``; as many columns in each.
        counts: For each piece ``[rows]`` int64, the lengths of its rows.
        index: For each piece ``[rows]`` int64, which row of the whole each one is; all together ``0..num_rows-1``.
        num_rows: Number of rows of the whole.

    Returns:
        The columns, and ``counts [num_rows]`` int64.
    """
    whole = torch.zeros(num_rows, dtype=torch.int64)
    for rows, count in zip(index, counts, strict=True):
        whole[rows] = count
    starts = np.empty(num_rows, dtype=np.int64)
    total = _starts(whole.numpy(), starts)
    columns = [torch.empty(total, dtype=column.dtype) for column in pieces[0]]
    for piece, count, rows in zip(pieces, counts, index, strict=True):
        for column, out in zip(piece, columns, strict=True):
            _place(rows.numpy(), count.numpy(), starts, column.numpy(), out.numpy())
    return columns, whole
