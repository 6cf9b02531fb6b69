r"""The process groups that partpar talks on: beside each of the user's one of its own."""

from __future__ import annotations

from datetime import timedelta
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from partpar import lost
from partpar.errors import RouteError

_own_groups: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()
_owned: WeakSet[ProcessGroup] = WeakSet()


def own_group(parent: ProcessGroup | None = None) -> ProcessGroup | None:
    r"""Returns the group that partpar talks on beside :obj:`parent`, making it at the first call (collective).

    All routes over one parent share one group: within a rank their exchanges follow the program's order, which is
    the same on every rank.

    Args:
        parent: The user's group; :obj:`None` means the default group.

    Returns:
        :obj:`None` when torch.distributed is not initialised or the parent has one rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    parent = dist.group.WORLD if parent is None else parent
    if not isinstance(parent, ProcessGroup):  # torch's NON_GROUP_MEMBER is a number
        raise RouteError(
            "expected a process group that this rank is a member of, found one that it is not in"
        )
    if dist.get_world_size(parent) == 1:
        return None
    if parent in _owned:  # a route may be built on another one's group
        return parent
    own = _own_groups.get(parent)
    if own is None:
        ranks = dist.get_process_group_ranks(parent)
        own = dist.new_group(
            ranks, timeout=timeout_of(parent), backend=dist.get_backend(parent), use_local_synchronization=True
        )
        _own_groups[parent] = own
        _owned.add(own)
        lost.introduce(own)
    return own


def beside(group: ProcessGroup) -> ProcessGroup:
    r"""The own group of a group, if one was made; else the group itself. Not collective."""
    return _own_groups.get(group, group)


def forget_groups() -> None:
    r"""Lets go of the groups made here, before the process group that they stand beside is ended."""
    _own_groups.clear()


def timeout_of(group: ProcessGroup) -> timedelta:
    """The timeout of a group: ``new_group`` would otherwise fall back to half an hour."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    r"""Rank and number of ranks of an own group; ``(0, 1)`` when alone."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def wire_device(group: ProcessGroup) -> torch.device:
    """gloo talks from host memory, NCCL from the current GPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(group) == "nccl"
        else torch.device("cpu")
    )
