r"""A service for a graph in one part: all destinations are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from partpar.errors import SamplingError
from partpar.graph import EdgeType, GraphData
from partpar.serving.hop import answer_hop
from partpar.serving.messages import HopReply, HopRequest


@dataclass(frozen=True)
class Answered:
    r"""A hop whose replies are there."""

    replies: dict[EdgeType, HopReply]

    def wait(self) -> dict[EdgeType, HopReply]:
        return self.replies


class LocalService:
    r"""Answers from one share; see :class:`~partpar.serving.protocol.SamplingService`.

    Args:
        share: The only share of a partition in one part, or a graph that was never cut and whose edges are sorted by
            destination.
    """

    def __init__(self, share: GraphData) -> None:
        if share.num_parts != 1:
            raise SamplingError(
                f"expected a graph in one part, found share {share.part_id} of {share.num_parts}"
            )
        self.share = share
        self._rows: dict[str, Tensor] = {}

    @property
    def node_types(self) -> list[str]:
        return self.share.node_types

    @property
    def edge_types(self) -> list[EdgeType]:
        return self.share.edge_types

    @property
    def part_id(self) -> int:
        return 0

    @property
    def num_parts(self) -> int:
        return 1

    def offsets(self, node_type: str) -> Tensor:
        return self.share.offsets(node_type)

    def hop_begin(self, requests: Mapping[EdgeType, HopRequest]) -> Answered:
        return Answered({t: answer_hop(self.share, request) for t, request in requests.items()})

    def ids_of(self, node_type: str, raw_ids: Tensor) -> Tensor:
        frame = self.share.node(node_type)
        if "raw_ids" not in frame:
            return raw_ids
        if node_type not in self._rows:
            self._rows[node_type] = torch.empty_like(frame["raw_ids"])
            self._rows[node_type][frame["raw_ids"]] = torch.arange(frame.num_rows)
        return self._rows[node_type][raw_ids]

    def has_node_attr(self, node_type: str, name: str) -> bool:
        return name in self.share.node(node_type)

    def node_rows(self, node_type: str, name: str, ids: Tensor) -> Tensor:
        return self.share.node(node_type)[name][ids]
