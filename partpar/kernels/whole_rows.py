r"""Rows of a table moved as wholes, by numpy alone: for workers that compile nothing and are spared the memory that a
compiler takes. :mod:`partpar.kernels.table` does the same by compiled loops, a third faster where rows are put in
another order.

Rows are checked before any is moved: they come from other workers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SOME_BYTES = 1 << 18  # rows that are moved at a time stay in the cache of a core


def whole(rows: Tensor) -> np.ndarray:
    r"""A view of contiguous rows ``[n, *]`` in host memory as ``[n]`` elements, whatever their dtype."""
    row_bytes = rows.shape[1:].numel() * rows.element_size()
    flat = rows.detach().view(rows.size(0), rows.shape[1:].numel()).view(torch.uint8).numpy()
    return flat.view(f"V{row_bytes}").reshape(-1)


def first_outside(rows: np.ndarray, num_rows: int) -> int:
    r"""The place of the first row that is not among so many, or -1."""
    if len(rows) == 0 or (rows.min() >= 0 and rows.max() < num_rows):
        return -1
    return int(((rows < 0) | (rows >= num_rows)).argmax())


def fetch_rows(table: np.ndarray, rows: np.ndarray, out: np.ndarray, at: np.ndarray | None = None) -> int:
    r"""``out[at[i]] = table[rows[i]]``, or ``out[i]`` without :obj:`at`.

    Args:
        table, out: See :func:`whole`.
        rows, at: ``[n]`` integers.

    Returns:
        The place of the first row that is outside, or -1.
    """
    wrong = first_outside(rows, len(table))
    if wrong >= 0 or len(rows) == 0:
        return wrong
    if at is None:
        np.take(table, rows, out=out, mode="clip")  # other modes go through a buffer
        return -1
    step = max(1, _SOME_BYTES // table.itemsize)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        out[at[some]] = table[rows[some]]
    return -1


def put_rows(table: np.ndarray, rows: np.ndarray, values: np.ndarray, at: np.ndarray | None = None) -> int:
    r"""``table[rows[i]] = values[at[i]]``, or ``values[i]``; of equal rows the last one stays. As :func:`fetch_rows` otherwise."""
    wrong = first_outside(rows, len(table))
    if wrong < 0:
        table[rows] = values if at is None else values[at]
    return wrong
