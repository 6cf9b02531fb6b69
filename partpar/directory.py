r"""Finding the owners of ids, and with them the tables of a route.

A share knows the owner of every id by ``offsets``. For arbitrary ids, a directory spread over the ranks is asked: rank
``hash(id) % world_size`` keeps who owns ``id``, after the distributed directories of Zoltan (Devine et al., 2002), so
that no rank ever sees all ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import AgreementError


@dataclass(frozen=True)
class Tables:
    r"""What a route needs beside the ids; see :class:`partpar.Route`."""

    num_owned: int
    num_halo: int
    send_index: Tensor
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]
    order: Tensor | None


def from_offsets(
    halo_ids: Tensor,
    offsets: Tensor,
    group: ProcessGroup | None,
    agreed: dict[str, int],
    part_id: int | None = None,
) -> Tables:
    r"""Tables of a share's route, in one exchange of ids (collective).

    Args:
        halo_ids: ``[num_halo]`` int64, ascending ids owned by other parts.
        offsets: ``[num_parts + 1]`` int64, the range of ids that each part owns.
        group: An own group of ``num_parts`` ranks.
        agreed: Further numbers that all ranks must have alike.
        part_id: Whose halo this is; by default that of the part that this rank is to hold.
    """
    rank, world_size = exchange.rank_and_size(group)
    num_parts, owned = offsets.numel() - 1, offsets.diff()
    wrong = None
    if num_parts != world_size:
        wrong = (
            f"to_route: expected as many ranks as the partition has parts ({num_parts}), found {world_size}; "
            f"start {num_parts} workers or partition into {world_size} parts"
        )
    parts = {f"rows of part {p}": n for p, n in enumerate(owned.tolist())} if num_parts <= 8 else {}
    held = rank if part_id is None else part_id
    told = exchange.agree(
        group, "to_route", {**agreed, "number of parts": num_parts, **parts, "_part": held}, wrong
    )
    _check_parts([fields["_part"] for fields in told])

    owners = torch.searchsorted(offsets, halo_ids, right=True) - 1
    recv_splits = torch.bincount(owners, minlength=world_size).tolist()
    asked, send_splits = exchange.swap_rows(halo_ids - offsets[owners], recv_splits, group)
    num_owned = int(owned[rank])
    outside = asked[(asked < 0) | (asked >= num_owned)]
    wrong = (
        f"to_route: a peer asked for row {int(outside[0])} of the {num_owned} rows owned here"
        if outside.numel()
        else None
    )
    exchange.agree(group, "to_route", {}, wrong)
    return Tables(num_owned, halo_ids.numel(), asked, tuple(send_splits), tuple(recv_splits), None)


def _check_parts(parts: list[int]) -> None:
    """Raises unless rank p holds part p; on every rank, as all of them were told the same."""
    for rank, part in enumerate(parts):
        if part != rank:
            first = parts.index(part)
            found = f"ranks {first} and {rank} both with part {part}" if first < rank else f"part {part} on rank {rank}"
            raise AgreementError(
                f"to_route: expected part p of the partition on rank p of the group, found {found}; pass each rank's own "
                "number, load_partition(root, part_id=worker.rank, num_parts=worker.world_size)"
            )


def from_raw_ids(src_ids: Tensor, dst_ids: Tensor, group: ProcessGroup | None) -> Tables:
    r"""Tables of a route over arbitrary ids (collective); arguments as in :meth:`partpar.Route.from_raw_ids`."""
    _, world_size = exchange.rank_and_size(group)
    wrong = _check_ids("src_ids", src_ids) or _check_ids("dst_ids", dst_ids) or _check_unique(dst_ids)
    exchange.agree(group, "from_raw_ids", {}, wrong)

    # Everyone tells the directory what it owns: the sender is the owner, the position is the row.
    owned_ids, owned_rows = dst_ids.sort()
    entries, entry_owner = _post(torch.stack([owned_ids, owned_rows], 1), home_of(owned_ids, world_size), group)
    by_id = entries[:, 0].argsort(stable=True)
    entries, entry_owner = entries[by_id], entry_owner[by_id]
    twice = (entries[1:, 0] == entries[:-1, 0]).nonzero().flatten()
    wrong = None
    if twice.numel():
        i = int(twice[0])
        a, b = sorted((int(entry_owner[i]), int(entry_owner[i + 1])))
        wrong = f"from_raw_ids: expected one owner for each id, found id {int(entries[i, 0])} in dst_ids of ranks {a} and {b}"
    exchange.agree(group, "from_raw_ids", {}, wrong)

    # Then everyone asks it for the ids it lacks.
    wanted = src_ids.unique()
    at = torch.searchsorted(owned_ids, wanted).clamp_(max=max(owned_ids.numel() - 1, 0))
    halo_ids = wanted[owned_ids[at] != wanted] if owned_ids.numel() else wanted
    home = home_of(halo_ids, world_size)
    by_home = home.argsort(stable=True)
    halo_ids = halo_ids[by_home]
    splits = torch.bincount(home, minlength=world_size).tolist()
    questions, question_splits = exchange.swap_rows(halo_ids, splits, group)
    at = torch.searchsorted(entries[:, 0].contiguous(), questions).clamp_(max=max(entries.size(0) - 1, 0))
    known = entries[at, 0] == questions if entries.size(0) else torch.zeros_like(questions, dtype=torch.bool)
    wrong = None
    if not bool(known.all()):
        wrong = f"from_raw_ids: expected an owner for each of src_ids, found id {int(questions[~known][0])} in dst_ids of no rank"
    exchange.agree(group, "from_raw_ids", {}, wrong)
    if questions.numel():
        answers = torch.stack([entry_owner[at], entries[at, 1]], 1)
    else:
        answers = questions.new_empty((0, 2))
    answers = exchange.send_rows(answers, question_splits, splits, group).wait()

    # Halo rows stand grouped by owner, then by the owner's row.
    by_owner = (answers[:, 1]).argsort(stable=True)
    by_owner = by_owner[answers[by_owner, 0].argsort(stable=True)]
    halo_ids, owners, rows = halo_ids[by_owner], answers[by_owner, 0], answers[by_owner, 1]
    recv_splits = torch.bincount(owners, minlength=world_size).tolist()
    send_index, send_splits = exchange.swap_rows(rows, recv_splits, group)

    num_owned, num_halo = dst_ids.numel(), halo_ids.numel()
    all_ids, all_rows = torch.cat([dst_ids, halo_ids]).sort()
    order = all_rows[torch.searchsorted(all_ids, src_ids)] if src_ids.numel() else src_ids
    straight = torch.equal(order, torch.arange(num_owned + num_halo))
    return Tables(
        num_owned, num_halo, send_index, tuple(send_splits), tuple(recv_splits), None if straight else order
    )


def _post(rows: Tensor, to: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Sends each row to a rank; returns the rows received and the rank each came from."""
    _, world_size = exchange.rank_and_size(group)
    received, splits = exchange.swap_rows(
        rows[to.argsort(stable=True)], torch.bincount(to, minlength=world_size).tolist(), group
    )
    return received, torch.repeat_interleave(torch.arange(world_size), torch.tensor(splits))


def home_of(ids: Tensor, world_size: int) -> Tensor:
    """The rank that keeps an id's entry: mixed first, so that strided ids spread evenly."""
    mixed = (ids ^ (ids >> 31)) * 0x2545F4914F6CDD1D
    return (mixed ^ (mixed >> 29)).remainder(world_size)


def _check_ids(name: str, ids: Tensor) -> str | None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        return f"from_raw_ids: expected {name} to be a 1-dimensional int64 tensor, found {found}"
    return None


def _check_unique(dst_ids: Tensor) -> str | None:
    ids = dst_ids.sort().values
    twice = ids[1:][ids[1:] == ids[:-1]]
    return (
        f"from_raw_ids: expected each id once in dst_ids, found id {int(twice[0])} more than once"
        if twice.numel()
        else None
    )
