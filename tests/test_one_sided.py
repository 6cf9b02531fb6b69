r"""Rows of sharded tensors for one rank while the others do something else."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from gang import Gang, Worker, launch

from partpar.errors import IdError, PeerLostError, RemoteError, RouteError
from partpar.sharded import DistTensor, serve_rows


def at_any_time(worker: Worker, dtype: torch.dtype) -> None:
    t, whole = DistTensor((31, 3), dtype, "t"), torch.arange(93).view(31, 3).to(dtype)
    t.local_rows[:] = whole[t.local_ids]
    with serve_rows() as service:
        ids = torch.tensor([30, 0, 30, 17, 2])
        apart = t.one_sided(service.transport)
        if worker.rank == worker.world_size - 1:  # nobody else calls
            asked = apart.gather_begin(ids)
            assert torch.equal(apart[ids.flip(0)], whole[ids.flip(0)])
            assert torch.equal(asked.wait(), whole[ids])
            assert apart[ids[:0]].shape == (0, 3)
            apart[torch.tensor([4, 29, 4])] = whole[[1, 2, 3]]
            assert torch.equal(apart[[4, 29]], whole[[3, 2]])
            apart[torch.arange(10)] = 1
        if worker.world_size > 1:
            dist.barrier(worker.group)
        assert torch.equal(t[[0, 9, 29]], torch.stack([torch.ones(3).to(dtype)] * 2 + [whole[2]]))


@pytest.mark.core_on(2)
def test_rows_move_whatever_the_others_do(gang: Gang, world_size: int) -> None:
    gang.run(at_any_time, world_size, torch.float32)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.int8])
def test_rows_of_other_dtypes_move(gang: Gang, dtype: torch.dtype) -> None:
    gang.run(at_any_time, 3, dtype)


def mistakes(worker: Worker) -> None:
    t, u = DistTensor((31, 3), name="t"), None
    if worker.rank == 0:  # the other rank's name for it is another
        u = DistTensor.__new__(DistTensor)
        u.group, u.shard = t.group, type(t.shard)("u", t.local_rows, t.part_policy, 0)
    with serve_rows() as service:
        if worker.rank == 0:
            apart = t.one_sided(service.transport)
            with pytest.raises(IdError, match="expected ids from 0 to 30, found 31 at place 1"):
                apart[torch.tensor([0, 31])]
            with pytest.raises(RouteError, match="expected rows"):
                apart[torch.tensor([0, 30])] = torch.zeros(2, 4)
            with pytest.raises(RouteError, match="expected a 1-dimensional tensor"):
                apart[torch.tensor([[0.5]])]
            assert u is not None
            with pytest.raises(RemoteError, match="expected the name of a tensor .* found 'u'; here are .*'t'"):
                u.one_sided(service.transport)[torch.tensor([30])]
        dist.barrier(worker.group)


def test_mistakes_are_told_to_who_makes_them(gang: Gang) -> None:
    gang.run(mistakes, 2)


def lose(worker: Worker) -> None:
    t = DistTensor((30, 3), name="t")
    service = serve_rows(timeout=10)
    if worker.rank == 1:
        dist.barrier(worker.group)
        os._exit(7)
    dist.barrier(worker.group)
    try:
        for _ in range(1000):
            t.one_sided(service.transport)[torch.arange(30)]
    finally:
        service.close(wait=False)


@pytest.mark.faults
def test_an_owner_that_dies_is_named() -> None:
    outcomes = launch(lose, 2, timeout=90, check=False)
    assert outcomes[0].error is not None
    assert outcomes[0].error[0] == PeerLostError.__name__
    assert "part 1" in outcomes[0].error[1]
