r"""A temporal graph as a sequence of snapshots, all cut by the one partition of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partpar.errors import GraphError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from partpar.graph.data import GraphData
    from partpar.hetero_route import HeteroRoute
    from partpar.route import Route


@dataclass(frozen=True)
class Snapshot:
    r"""The edges of one window of time.

    Args:
        index: The window's number, from 0.
        start: When it begins.
        end: When it ends; only the last window holds its end too.
        share: The owned nodes, this window's edges into them, and the halo that these need.
        route: Of that share.
    """

    index: int
    start: float
    end: float
    share: GraphData
    route: Route | HeteroRoute


def snapshots(graph: GraphData, group: ProcessGroup | None) -> list[Snapshot]:
    """See :meth:`GraphData.snapshots`."""
    from partpar.graph.select import select_edges

    windows = None if graph.part is None else graph.part.windows
    if windows is None:
        raise GraphError(
            "snapshots: expected a share of a temporal graph, found one without windows of time; cut the graph by "
            "partition_graph(..., time_attr=..., num_snapshots=...)"
        )
    made = []
    for index in range(len(windows.boundaries) - 1):
        kept = {
            t: windows.mask(index, graph.edge(t)[windows.time_attr]) if windows.time_attr in graph.edge(t) else None
            for t in graph.edge_types
        }
        share = select_edges(graph, kept)
        start, end = windows.boundaries[index : index + 2]
        made.append(Snapshot(index, start, end, share, share.to_route(group)))
    return made
