r"""Who a process is among those that sample together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DistRole(Enum):
    r"""What a process does; all do the same."""

    WORKER = 1


@dataclass
class DistContext:
    r"""A process among others.

    Args:
        rank: Its number in its group.
        global_rank: Its number among all.
        world_size: Processes of its group.
        global_world_size: All processes.
        group_name: What all names of the group begin with.
        role: What it does.
    """

    rank: int
    global_rank: int
    world_size: int
    global_world_size: int
    group_name: str
    role: DistRole = DistRole.WORKER

    @property
    def worker_name(self) -> str:
        r"""Its name, different from all others."""
        return f"{self.group_name}-{self.rank}"
