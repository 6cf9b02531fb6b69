r"""Constant rows of a sequence of snapshots, fetched while the snapshot before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.graph import Snapshot
from partpar.nn.source_rows import SourceRows
from partpar.route import Route


def fetch_ahead(
    snapshots: Sequence[Snapshot], rows_of: Callable[[Snapshot], Tensor]
) -> Iterator[tuple[Snapshot, SourceRows]]:
    r"""Goes through snapshots of a one-type graph; the exchange of the next one's constant rows begins before the
    caller works on this one, and is awaited when its turn comes (collective).

    .. code-block:: python

        for snapshot, x in fetch_ahead(snapshots, lambda s: features[s.index]):
            z = conv(x, snapshot.share.adj(), snapshot.route)       # sends nothing
            h = gru(z, h)

    Args:
        snapshots: Of ``share.snapshots()``, or a stretch of them.
        rows_of: Gives the rows ``[num_owned, C]`` of a snapshot's owned nodes, which need no gradient.

    Yields:
        Each snapshot with its rows, whose halo is there.

    Raises:
        RouteError: The graph has several node types.
    """

    def route_of(snapshot: Snapshot) -> Route:
        if not isinstance(snapshot.route, Route):
            raise RouteError(
                "fetch_ahead: expected snapshots of a graph of one type, found several types; begin the next one's exchange "
                "by snapshot.route.apply_begin({type: x})"
            )
        return snapshot.route

    def begin(snapshot: Snapshot) -> tuple[Tensor, Callable[[], Tensor]]:
        with torch.no_grad():
            rows = rows_of(snapshot)
            return rows, route_of(snapshot).apply_begin(rows).wait

    coming = begin(snapshots[0]) if snapshots else None
    for number, snapshot in enumerate(snapshots):
        assert coming is not None
        rows, wait = coming
        coming = begin(snapshots[number + 1]) if number + 1 < len(snapshots) else None
        x = SourceRows(rows, route_of(snapshot))
        x.keep("rows", wait)
        yield snapshot, x
