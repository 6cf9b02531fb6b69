r"""Input rows that never change: what a first layer needs of other workers is fetched once, then nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.route import Route


@dataclass(frozen=True, eq=False)
class SourceRows:
    r"""Constant rows of the owned nodes, and what derives from them and those of other workers; make them by
    :func:`keep_halo`. Layers and models take them for ``x``.

    A layer that sums its neighbours' rows before anything else keeps the sums, and no halo row need be held; one that
    maps rows first keeps the rows of the halo. Either is made at first use (collective) and made anew if somebody
    changes :obj:`owned` in place, which must then happen on every rank.

    Args:
        owned: ``[num_owned, C]``.
        route: The share's route; :obj:`None` when one process owns everything.
    """

    owned: Tensor
    route: Route | None = None
    _kept: dict[Any, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"SourceRows({list(self.owned.shape)} {self.owned.dtype}, {self.route})"

    @property
    def rows(self) -> Tensor:
        r"""``[num_src, C]``: the owned nodes', then the halo's."""
        route = self.route
        if route is None or route.group is None:
            return self.owned
        return self.keep("rows", lambda: route.apply(self.owned))

    @property
    def fetched(self) -> bool:
        r"""Whether the halo is here already, so that sums of rows need no exchange."""
        kept = self._kept.get("rows")
        return self.route is None or self.route.group is None or (kept is not None and kept[0] == (self.owned._version,))

    def keep(self, key: Any, build: Callable[[], Tensor], *others: SourceRows) -> Tensor:
        r"""What :obj:`build` makes of these rows, and of others; made once, exactly, whatever the route's policy."""
        versions = tuple(rows.owned._version for rows in (self, *others))
        kept = self._kept.get(key)
        if kept is None or kept[0] != versions:
            with torch.no_grad():
                kept = self._kept[key] = (versions, build())
        return kept[1]


def keep_halo(x: Tensor, route: Route | None = None) -> SourceRows:
    r"""Declares rows constant, so that what layers need of the halo is fetched once (collective).

    Args:
        x: ``[num_owned, C]``, rows of the owned nodes that need no gradient, such as input features.
        route: The share's route; :obj:`None` when one process owns everything.

    Raises:
        RouteError: :obj:`x` requires a gradient, so it is not constant; on every rank.
    """
    wrong = None
    if x.requires_grad:
        wrong = "keep_halo: expected constant rows, found rows that require a gradient; pass x itself to the model"
    if route is not None:
        route.check("keep_halo", x, wrong=wrong)
    elif wrong is not None:
        raise RouteError(wrong)
    return SourceRows(x, route)
