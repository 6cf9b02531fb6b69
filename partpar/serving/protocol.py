r"""What a sampler asks of a service, whoever provides it: one process that holds the whole graph, or many parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from partpar.graph import EdgeType
from partpar.serving.messages import HopReply, HopRequest


class HopInFlight(Protocol):
    r"""A hop that was begun."""

    def wait(self) -> dict[EdgeType, HopReply]:
        r"""The replies, their rows in the order of the requests; raises what a part raised, with its name."""
        ...


class SamplingService(Protocol):
    r"""Answers for the whole graph: destinations may be owned by any part."""

    @property
    def node_types(self) -> Sequence[str]: ...

    @property
    def edge_types(self) -> Sequence[EdgeType]: ...

    @property
    def part_id(self) -> int: ...

    @property
    def num_parts(self) -> int: ...

    def offsets(self, node_type: str) -> Tensor:
        r"""``[num_parts + 1]`` int64: part p owns ids ``offsets[p]`` to ``offsets[p + 1] - 1``."""
        ...

    def hop_begin(self, requests: Mapping[EdgeType, HopRequest]) -> HopInFlight:
        r"""Asks the owners, all at once; ids in the requests may be anybody's."""
        ...

    def ids_of(self, node_type: str, raw_ids: Tensor) -> Tensor:
        r"""The ids after renumbering of raw ids ``[n]`` int64. Only negative sampling asks for it."""
        ...

    def has_node_attr(self, node_type: str, name: str) -> bool:
        r"""Whether nodes of a type have an attribute. Only temporal negative sampling asks for it."""
        ...

    def node_rows(self, node_type: str, name: str, ids: Tensor) -> Tensor:
        r"""Rows of a node attribute by ids after renumbering. Only temporal negative sampling asks for it."""
        ...
