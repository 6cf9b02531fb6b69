r"""The pieces a graph is made of: edges grouped by destination, and which share of which partition it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

EdgeType: TypeAlias = tuple[str, str, str]

NODE: str = "node"
EDGE: EdgeType = (NODE, "to", NODE)


@dataclass(frozen=True)
class CSC:
    r"""Edges grouped by destination: those into ``i`` come from ``indices[indptr[i]:indptr[i + 1]]``."""

    indptr: Tensor
    indices: Tensor

    def to(self, device: torch.device | str) -> CSC:
        r"""The same edges on another device."""
        return CSC(self.indptr.to(device), self.indices.to(device))

    def edge_index(self) -> Tensor:
        r"""``[2, E]`` int64."""
        degree = self.indptr.diff()
        dst = torch.repeat_interleave(torch.arange(degree.numel(), device=degree.device), degree)
        return torch.stack([self.indices.to(torch.int64), dst])


@dataclass(frozen=True)
class Windows:
    r"""How edges fall into snapshots: window ``k`` holds the times from ``boundaries[k]`` up to, but without,
    ``boundaries[k + 1]``; the last one holds its end too. Edges of a type without the attribute are in all of them.

    Args:
        time_attr: The edge attribute that is an edge's time.
        boundaries: Rising numbers, one more than windows.
    """

    time_attr: str
    boundaries: tuple[float, ...]

    def mask(self, window: int, time: Tensor) -> Tensor:
        r"""``[E]`` bool: which edges are in a window."""
        start, end = self.boundaries[window : window + 2]
        before_end = time <= end if window == len(self.boundaries) - 2 else time < end
        return (time >= start) & before_end


@dataclass(frozen=True)
class Part:
    r"""Which piece of which partition a share is. Part p owns ids ``offsets[type][p]`` to ``offsets[type][p + 1] - 1``."""

    part_id: int
    num_parts: int
    offsets: Mapping[str, Tensor]
    run_id: str
    windows: Windows | None = None
