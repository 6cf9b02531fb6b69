r"""From the arguments of a temporal partition to windows of time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from partpar.errors import PartitionError
from partpar.graph import GraphData, Windows


def make_windows(
    graph: GraphData, time_attr: str | None, num_snapshots: int | None, boundaries: Sequence[float] | None
) -> Windows | None:
    r"""The windows asked for; :obj:`None` where none are.

    Args:
        graph: A whole graph.
        time_attr: The edge attribute that is an edge's time.
        num_snapshots: How many windows of equal length.
        boundaries: Or where they lie.

    Raises:
        PartitionError: Arguments do not fit the graph or each other.
    """
    if time_attr is None:
        if num_snapshots is not None or boundaries is not None:
            raise PartitionError(
                "time_attr: expected the edge attribute that is an edge's time, as num_snapshots or boundaries are given; found None"
            )
        return None
    times = [graph.edge(t)[time_attr] for t in graph.edge_types if time_attr in graph.edge(t)]
    if not times:
        known = sorted({name for t in graph.edge_types for name in graph.edge(t)})
        raise PartitionError(
            f"time_attr: expected the name of an edge attribute ({known}), found {time_attr!r}"
        )
    for time in times:
        if time.dim() != 1 or time.dtype == torch.bool or time.dtype.is_complex:
            found = f"{time.dtype} of shape {tuple(time.shape)}"
        elif (odd := (~torch.isfinite(time)).nonzero()).numel():
            found = f"{time[odd[0]].item()} at edge {int(odd[0])}"
        else:
            continue
        raise PartitionError(f"time_attr {time_attr!r}: expected one finite number an edge, found {found}")
    if (num_snapshots is None) == (boundaries is None):
        raise PartitionError(
            f"expected either num_snapshots or boundaries with time_attr, found {num_snapshots} and {boundaries}"
        )
    if boundaries is not None:
        given = tuple(b.item() if isinstance(b, torch.Tensor) else b for b in boundaries)
        rising = all(a < b for a, b in itertools.pairwise(given))
        if len(given) < 2 or not all(map(math.isfinite, given)) or not rising:
            raise PartitionError(
                f"boundaries: expected at least 2 rising finite numbers, found {list(given)}"
            )
        return Windows(time_attr, given)
    assert num_snapshots is not None
    if num_snapshots < 1:
        raise PartitionError(f"num_snapshots: expected at least 1, found {num_snapshots}")
    filled = [time for time in times if time.numel()]
    if not filled:
        raise PartitionError(f"time_attr {time_attr!r}: expected edges to divide by time, found none")
    first, last = min(t.min().item() for t in filled), max(t.max().item() for t in filled)
    bounds: list[float]
    if isinstance(first, int) and isinstance(last, int):  # whole numbers stay exact
        bounds = [first + -(-(last - first) * k // num_snapshots) for k in range(num_snapshots + 1)]
    else:
        bounds = [first + (last - first) * k / num_snapshots for k in range(num_snapshots)] + [last]
    if any(a >= b for a, b in itertools.pairwise(bounds)) and num_snapshots > 1:
        raise PartitionError(
            f"num_snapshots: expected windows that are not empty spans, found {num_snapshots} over the times {first} to "
            f"{last}; ask for fewer"
        )
    return Windows(time_attr, tuple(bounds))
