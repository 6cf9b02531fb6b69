r"""Input rows that never change, with those of the halo fetched once: a first layer then sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from partpar.errors import RouteError
from partpar.route import Route


@dataclass(frozen=True, eq=False)
class SourceRows:
    r"""Constant rows of all sources; make them by :func:`keep_halo`. Layers and models take them for ``x``.

    What a layer derives from them alone, such as their sums over in-neighbours, is kept as well, as long as nobody
    changes :obj:`rows` in place.

    Args:
        rows: ``[num_src, C]``: the owned nodes', then the halo's.
        num_owned: How many are owned.
    """

    rows: Tensor
    num_owned: int
    _kept: dict[Any, tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def owned(self) -> Tensor:
        r"""``[num_owned, C]``."""
        return self.rows[: self.num_owned]

    def keep(self, key: Any, build: Callable[[], Tensor]) -> Tensor:
        r"""What :obj:`build` makes of the rows; made once."""
        kept = self._kept.get(key)
        if kept is None or kept[0] != self.rows._version:
            kept = self._kept[key] = (self.rows._version, build())
        return kept[1]


def keep_halo(x: Tensor, route: Route | None = None) -> SourceRows:
    r"""Fetches the halo of constant rows, once (collective).

    Args:
        x: ``[num_owned, C]``, rows of the owned nodes that need no gradient, such as input features.
        route: The share's route; :obj:`None` when one process owns everything.

    Raises:
        RouteError: :obj:`x` requires a gradient, so it is not constant; on every rank.
    """
    wrong = (
        "keep_halo: expected constant rows, found rows that require a gradient; pass x itself to the model"
        if x.requires_grad
        else None
    )
    if route is None:
        if wrong is not None:
            raise RouteError(wrong)
        return SourceRows(x, x.size(0))
    route.check("keep_halo", x, wrong=wrong)
    return SourceRows(route.apply(x), route.num_owned)
