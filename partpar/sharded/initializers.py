r"""First values of rows. Those here are drawn by a counter from seed, row and column, so they are the same for any
number of workers, and each worker makes its own rows alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.kernels.bits import key
from partpar.kernels.initial import fill_normal, fill_uniform

_CHUNK = 1 << 16  # rows whose ids are made at a time


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


class _Drawn(ABC):
    """Drawn by a counter."""

    def of(self, ids: Tensor) -> OfIds:
        r"""The same numbers for a worker's rows as rows of these ids would have: their raw ids, so that first values
        do not depend on how the graph was cut.

        Args:
            ids: ``[num_local]`` int64, for each row that this worker keeps.
        """
        return OfIds(self, ids)

    @abstractmethod
    def draw(self, rows: Tensor, ids: Tensor) -> None:
        """Fills ``[n, *]``, the rows of these ids, in place."""

    def fill(self, rows: Tensor, first_id: int) -> None:
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            self.draw(some, torch.arange(first_id + start, first_id + start + len(some)))


@dataclass(frozen=True)
class OfIds:
    r"""First values of rows that go by other ids; see ``Normal(...).of(ids)``."""

    init: _Drawn
    ids: Tensor

    def fill(self, rows: Tensor, first_id: int) -> None:
        if self.ids.dtype != torch.int64 or self.ids.shape != rows.shape[:1]:
            raise RouteError(
                f"init_func: expected int64 ids of the {len(rows)} rows here, found {self.ids.dtype} of shape {tuple(self.ids.shape)}"
            )
        self.init.draw(rows, self.ids)


@dataclass(frozen=True)
class Uniform(_Drawn):
    r"""Uniform in ``[low, high)``; draws have 53 bits and are rounded to the dtype."""

    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def draw(self, rows: Tensor, ids: Tensor) -> None:
        _draw(fill_uniform, rows, ids, self.seed, self.low, self.high)


@dataclass(frozen=True)
class Normal(_Drawn):
    r"""Normal with :obj:`mean` and standard deviation :obj:`std`."""

    mean: float = 0.0
    std: float = 1.0
    seed: int = 0

    def draw(self, rows: Tensor, ids: Tensor) -> None:
        _draw(fill_normal, rows, ids, self.seed, self.mean, self.std)


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
        RouteError: The function raised, or returned something else than such rows.
    """
    if init_func is None:
        rows.zero_()
    elif hasattr(init_func, "fill"):
        init_func.fill(rows, first_id)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                made = init_func(rows.shape, rows.dtype)
            except Exception as error:  # told to all ranks, which would wait for this one
                name = getattr(init_func, "__name__", repr(init_func))
                raise RouteError(
                    "init_func: expected a function of shape and dtype that returns rows, or a filler such as Normal(std=0.1), "
                    f"found {name}, which raised {type(error).__name__}: {error}"
                ) from error
        if not isinstance(made, Tensor) or made.shape != rows.shape:
            found = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise RouteError(f"init_func: expected a tensor of shape {tuple(rows.shape)}, found {found}")
        rows.copy_(made)


def _draw(fill: Callable[..., None], rows: Tensor, ids: Tensor, seed: int, a: float, b: float) -> None:
    if not rows.dtype.is_floating_point:
        raise RouteError(f"init_func: expected a floating dtype for random rows, found {rows.dtype}")
    fill(rows.view(rows.size(0), rows.shape[1:].numel()), ids, key(seed, 0, 0), a, b)
