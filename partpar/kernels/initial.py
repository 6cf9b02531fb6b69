r"""Filling rows with counter-based numbers: an entry depends on the seed, its row's id and its column. In torch and
numpy, for it is done once for a table, and workers that train embeddings need no compiler otherwise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from partpar.kernels.bits import bits, shift

_UNIT = 2.0**-53
_SOME = 1 << 15  # draws at a time: what is in between stays in the cache of a core


def _unit(ids: Tensor, key: int, num_columns: int) -> Tensor:
    """Uniform in ``[0, 1)``, float64 ``[n, num_columns]``."""
    return shift(bits(key, ids, num_columns), 11).double().mul_(_UNIT)


def fill_uniform(out: Tensor, ids: Tensor, key: int, low: float, high: float) -> None:
    r"""``out[i]`` uniform in ``[low, high)`` for the row ``ids[i]``; ``out`` is ``[n, C]`` of a floating dtype."""
    some = max(1, _SOME // out.size(1))
    for rows, of in zip(out.split(some), ids.split(some), strict=True):
        rows.copy_(low + (high - low) * _unit(of, key, out.size(1)))


def fill_normal(out: Tensor, ids: Tensor, key: int, mean: float, std: float) -> None:
    r"""``out[i]`` normal for the row ``ids[i]`` (Box and Muller, 1958; two draws an entry, no pair kept)."""
    some = max(1, _SOME // out.size(1))
    for rows, of in zip(out.split(some), ids.split(some), strict=True):
        # 1 - u lies in (0, 1]: its logarithm is finite.
        u, v = _unit(of, key, 2 * out.size(1)).view(*rows.shape, 2).numpy().transpose(2, 0, 1)
        drawn = mean + std * (np.sqrt(-2.0 * np.log(1.0 - u)) * np.cos(2.0 * np.pi * v))
        rows.copy_(torch.from_numpy(drawn))
