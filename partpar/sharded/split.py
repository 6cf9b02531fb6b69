r"""Each worker's share of some ids, such as those to train on: its own first, and as many as the others have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import RouteError
from partpar.graph import EdgeType, GraphData
from partpar.sharded.policy import PartPolicy, as_policy, edge_policy, node_policy
from partpar.sharded.tensor import DistTensor


def node_split(
    nodes: Tensor | DistTensor,
    part_policy: PartPolicy | Tensor | Sequence[int] | GraphData | None = None,
    node_type: str | None = None,
    force_even: bool = True,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""This worker's share of some nodes (collective).

    Args:
        nodes: Which nodes: ids ``[n]`` int64, of which every rank names at least its own; a bool mask of all nodes, or
            of the nodes that this worker owns; or a mask that is a :class:`DistTensor`.
        part_policy: A share, offsets or a policy, see :class:`DistTensor`; that of :obj:`nodes` where it has one.
        node_type: Whose nodes, where a share with several types is given.
        force_even: Give from workers that own more of the nodes to those that own fewer, until all have as many, but for
            one. Otherwise each has those that it owns.
        group: The process group; by default all processes.

    Returns:
        int64 ids: those owned here in ascending order, then those of others. Each is on one worker.

    Raises:
        RouteError: :obj:`nodes` is neither ids nor such a mask, or there is no telling whose they are; on every rank.
    """
    policy = node_policy(part_policy, node_type) if isinstance(part_policy, GraphData) else part_policy
    return _split("node_split", nodes, policy, force_even, group)


def edge_split(
    edges: Tensor | DistTensor,
    part_policy: PartPolicy | Tensor | Sequence[int] | GraphData | None = None,
    edge_type: EdgeType | None = None,
    force_even: bool = True,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""This worker's share of some edges (collective); arguments as for :func:`node_split`."""
    policy = edge_policy(part_policy, edge_type, group) if isinstance(part_policy, GraphData) else part_policy
    return _split("edge_split", edges, policy, force_even, group)


def _split(
    what: str,
    chosen: Tensor | DistTensor,
    part_policy: PartPolicy | Tensor | Sequence[int] | None,
    force_even: bool,
    group: ProcessGroup | None,
) -> Tensor:
    own = exchange.own_group(group)
    rank, size = exchange.rank_and_size(own)
    error, ids = None, torch.empty(0, dtype=torch.int64)
    try:
        ids = _own_ids(what, chosen, part_policy, rank, size)
    except RouteError as wrong:
        error = str(wrong)
    counts = [told["_count"] for told in exchange.agree(own, what, {"_count": len(ids)}, error)]
    if not force_even or size == 1:
        return ids
    goal = [sum(counts) // size + (part < sum(counts) % size) for part in range(size)]
    splits = _gifts(counts, goal)[rank]
    kept = min(counts[rank], goal[rank])
    given, _ = exchange.swap_rows(ids[kept:].contiguous(), splits, own)
    return torch.cat([ids[:kept], given])


def _own_ids(
    what: str,
    chosen: Tensor | DistTensor,
    part_policy: PartPolicy | Tensor | Sequence[int] | None,
    rank: int,
    size: int,
) -> Tensor:
    """Ascending ids that this worker owns and were chosen."""
    if isinstance(chosen, DistTensor):
        policy, mask = chosen.part_policy, chosen.local_rows
    elif not isinstance(chosen, Tensor) or chosen.dim() != 1 or chosen.dtype not in (torch.bool, torch.int64):
        found = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise RouteError(f"{what}: expected int64 ids or a bool mask, found {found}")
    else:
        mask = chosen
        if part_policy is None and chosen.dtype != torch.bool:
            raise RouteError(f"{what}: expected a part_policy beside ids, found None; pass the share")
        if part_policy is None or isinstance(part_policy, PartPolicy):
            policy = as_policy(part_policy, len(chosen) if part_policy is None else part_policy.num_rows, size)
        else:
            policy = as_policy(part_policy, int(part_policy[-1]), size)
    low, high = policy.offsets[rank], policy.offsets[rank + 1]
    if mask.dtype == torch.int64:
        outside = mask[(mask < 0) | (mask >= policy.num_rows)]
        if outside.numel():
            raise RouteError(f"{what}: expected ids from 0 to {policy.num_rows - 1}, found {int(outside[0])}")
        return mask[(mask >= low) & (mask < high)].unique()
    if mask.dtype != torch.bool or mask.dim() != 1 or len(mask) not in (policy.num_rows, high - low):
        raise RouteError(
            f"{what}: expected a bool mask of {policy.num_rows} rows, or of the {high - low} owned here, found "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    mask = mask[low:high] if len(mask) == policy.num_rows else mask
    return mask.nonzero().flatten() + low


def _gifts(counts: list[int], goal: list[int]) -> list[list[int]]:
    """How many ids each worker gives to each other: who has too many fills up, in rank order, who has too few."""
    splits = [[0] * len(counts) for _ in counts]
    lacking = [max(want - have, 0) for have, want in zip(counts, goal, strict=True)]
    for giver, (have, want) in enumerate(zip(counts, goal, strict=True)):
        spare = max(have - want, 0)
        for taker in range(len(counts)):
            gift = min(spare, lacking[taker])
            splits[giver][taker] = gift
            spare, lacking[taker] = spare - gift, lacking[taker] - gift
    return splits
