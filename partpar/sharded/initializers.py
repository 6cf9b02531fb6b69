r"""First values of rows. Those here are drawn by a counter from seed, row and column, so they are the same for any
number of workers, and each worker makes its own rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.kernels import counter
from partpar.kernels.initial import fill_normal, fill_uniform


class Initializer(Protocol):
    r"""What fills rows by their ids."""

    def fill(self, rows: Tensor, first_id: int) -> None:
        r"""Fills ``[n, *]``, the rows ``first_id`` to ``first_id + n - 1``, in place."""
        ...


InitFunc: TypeAlias = Initializer | Callable[[torch.Size, torch.dtype], Tensor]


@dataclass(frozen=True)
class Constant:
    r"""Every entry is :obj:`value`."""

    value: float = 0.0

    def fill(self, rows: Tensor, first_id: int) -> None:
        rows.fill_(self.value)


@dataclass(frozen=True)
class Uniform:
    r"""Uniform in ``[low, high)``; draws have 53 bits and are rounded to the dtype."""

    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def fill(self, rows: Tensor, first_id: int) -> None:
        _fill(fill_uniform, rows, first_id, self.seed, self.low, self.high)


@dataclass(frozen=True)
class Normal:
    r"""Normal with :obj:`mean` and standard deviation :obj:`std`."""

    mean: float = 0.0
    std: float = 1.0
    seed: int = 0

    def fill(self, rows: Tensor, first_id: int) -> None:
        _fill(fill_normal, rows, first_id, self.seed, self.mean, self.std)


def xavier_uniform(num_rows: int, num_columns: int, gain: float = 1.0, seed: int = 0) -> Uniform:
    r"""Uniform within ``gain * sqrt(6 / (num_rows + num_columns))`` (Glorot and Bengio, AISTATS 2010)."""
    bound = gain * (6.0 / (num_rows + num_columns)) ** 0.5
    return Uniform(-bound, bound, seed)


def initialise(rows: Tensor, first_id: int, init_func: InitFunc | None, seed: int) -> None:
    r"""Fills a worker's rows in place.

    Args:
        rows: ``[n, *]``.
        first_id: The id of the first.
        init_func: One of the above; or a function of shape and dtype that returns rows, which is called with torch's
            generator seeded by :obj:`seed`; or :obj:`None` for zeros.
        seed: Of this shard.

    Raises:
        RouteError: The function returned something else than such rows.
    """
    if init_func is None:
        rows.zero_()
    elif hasattr(init_func, "fill"):
        init_func.fill(rows, first_id)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = init_func(rows.shape, rows.dtype)
        if not isinstance(made, Tensor) or made.shape != rows.shape:
            found = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise RouteError(f"init_func: expected a tensor of shape {tuple(rows.shape)}, found {found}")
        rows.copy_(made)


def _fill(fill: Callable[..., None], rows: Tensor, first_id: int, seed: int, a: float, b: float) -> None:
    if not rows.dtype.is_floating_point:
        raise RouteError(f"init_func: expected a floating dtype for random rows, found {rows.dtype}")
    flat, key = rows.view(rows.size(0), rows.shape[1:].numel()), np.uint64(counter.key(seed, 0, 0))
    if rows.dtype in (torch.float32, torch.float64):
        fill(flat.numpy(), first_id, key, a, b)
        return
    wide = torch.empty(flat.shape, dtype=torch.float32)
    fill(wide.numpy(), first_id, key, a, b)
    flat.copy_(wide)
