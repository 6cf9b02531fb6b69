r"""Which worker keeps which rows: ranges of ids, as everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import RouteError
from partpar.graph import EdgeType, Frame, GraphData


@dataclass(frozen=True)
class PartPolicy:
    r"""Worker p keeps the rows ``offsets[p]`` to ``offsets[p + 1] - 1``.

    Args:
        offsets: ``num_parts + 1`` numbers that rise from 0 to the number of rows.
        numbering: What ids mean: a number of the partition whose ids they are, 0 for ids that belong to none.
        raw_ids: ``[num_local]`` int64, what this worker's ids stand for, by which rows find their way from one partition to
            another.
    """

    offsets: tuple[int, ...]
    numbering: int = field(default=0, compare=False)  # told when rows are loaded, for rows of other ids are others'
    raw_ids: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        steps = np.diff(self.offsets)
        if len(self.offsets) < 2 or self.offsets[0] != 0 or (steps < 0).any():
            raise RouteError(
                f"part_policy: expected offsets that rise from 0 to the number of rows, found {list(self.offsets)}"
            )

    @property
    def num_parts(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        return self.offsets[-1]


def even_policy(num_rows: int, num_parts: int) -> PartPolicy:
    r"""Parts of equal size, but for one row, of any number of rows."""
    return PartPolicy(tuple(part * num_rows // num_parts for part in range(num_parts + 1)))


def node_policy(share: GraphData, node_type: str | None = None) -> PartPolicy:
    r"""Rows live with the owners of the nodes.

    Args:
        share: A worker's share, or a whole graph.
        node_type: Whose nodes; may be left out where there is one type.
    """
    return PartPolicy(tuple(share.offsets(node_type).tolist()), *_meaning(share, share.node(node_type)))


def edge_policy(
    share: GraphData, edge_type: EdgeType | None = None, group: ProcessGroup | None = None
) -> PartPolicy:
    r"""Rows live with the edges, hence with the owners of their destinations (collective).

    Args:
        share: A worker's share, or a whole graph.
        edge_type: Which edges; may be left out where there is one type.
        group: Process group with one rank for each part; by default all processes.
    """
    counts = exchange.all_gather(torch.tensor(share.num_edges(edge_type)), exchange.own_group(group))
    return PartPolicy((0, *counts.cumsum(0).tolist()), *_meaning(share, share.edge(edge_type)))


def _meaning(share: GraphData, frame: Frame) -> tuple[int, Tensor | None]:
    """The number of a share's partition, and what the ids of a frame's rows stand for."""
    return (0, None) if share.part is None else (int(share.part.run_id[:15] or "0", 16), frame["raw_ids"])


def as_policy(
    part_policy: PartPolicy | Tensor | Sequence[int] | GraphData | None, num_rows: int, num_parts: int
) -> PartPolicy:
    r"""What a user may give for a policy, as one.

    Raises:
        RouteError: It is for other numbers of rows or parts.
    """
    if part_policy is None:
        policy = even_policy(num_rows, num_parts)
    elif isinstance(part_policy, PartPolicy):
        policy = part_policy
    elif isinstance(part_policy, GraphData):
        policy = node_policy(part_policy)
    else:
        policy = PartPolicy(tuple(int(offset) for offset in part_policy))
    if policy.num_parts != num_parts or policy.num_rows != num_rows:
        raise RouteError(
            f"part_policy: expected {num_rows} rows in as many parts as there are workers ({num_parts}), found "
            f"{policy.num_rows} rows in {policy.num_parts} parts; pass the offsets of this very partition, or None"
        )
    return policy
