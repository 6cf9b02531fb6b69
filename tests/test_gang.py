r"""The gang must show what fails, never hang and outlive every failure; else no other test can be trusted."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from gang import Gang, GangError, Worker, launch


def rank_sum(worker: Worker, scale: int = 1) -> tuple[int, int, float]:
    x = torch.full((3,), float(worker.rank + 1)) * scale
    dist.all_reduce(x, group=worker.group)
    return worker.rank, dist.get_world_size(worker.group), float(x[0])


def environment(worker: Worker) -> tuple[str, int, int]:
    return os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.getpid()


def raise_on(worker: Worker, rank: int | None, message: str) -> None:
    if rank is None or worker.rank == rank:
        raise ValueError(message)
    dist.barrier(group=worker.group)


def out_of_step(worker: Worker) -> None:
    dist.all_reduce(torch.ones(2), group=worker.group)
    if worker.rank == 0:
        raise KeyError("left early")
    dist.all_reduce(torch.ones(2), group=worker.group)


def sleep_on(worker: Worker, rank: int, seconds: float) -> None:
    if worker.rank == rank:
        time.sleep(seconds)


def exit_on(worker: Worker, rank: int, code: int) -> None:
    if worker.rank == rank:
        os._exit(code)
    dist.barrier(group=worker.group)


def new_groups(worker: Worker) -> float:
    x = torch.ones(1)
    for _ in range(5):
        dist.all_reduce(x, group=dist.new_group(range(worker.world_size)))
    return float(x)


def set_up_alone(worker: Worker) -> tuple[bool, int, str]:
    before = dist.is_initialized()
    dist.init_process_group("gloo")
    dist.barrier()
    return before, dist.get_world_size(), os.environ["FLAVOUR"]


def leave_a_failing_exit(worker: Worker) -> None:
    import atexit

    atexit.register(os._exit, 3)


def test_results_come_by_rank(gang: Gang, world_size: int) -> None:
    total = 10.0 * world_size * (world_size + 1) / 2
    assert gang.run(rank_sum, world_size, scale=10) == [
        (rank, world_size, total) for rank in range(world_size)
    ]


def test_processes_stay_and_have_one_thread(gang: Gang) -> None:
    first, second = gang.run(environment, 4), gang.run(environment, 4)
    assert first == second
    assert all(answer[:2] == ("1", 1) for answer in first)
    assert len({pid for *_, pid in first} | {os.getpid()}) == 5


def test_tracebacks_are_seen_and_the_processes_stay(gang: Gang) -> None:
    before = gang.run(environment, 3)
    with pytest.raises(
        GangError, match=r"(?s)rank 2 of 3 in raise_on raised.*in raise_on.*ValueError: the third"
    ):
        gang.run(raise_on, 3, 2, "the third")
    assert gang.run(environment, 3) == before


def test_errors_on_all_ranks_are_returned(gang: Gang, world_size: int) -> None:
    errors = gang.run_expecting_errors(raise_on, world_size, None, "on all")
    assert errors == [("ValueError", "on all")] * world_size
    assert gang.run_expecting_errors(rank_sum, world_size) == [None] * world_size


def test_who_waits_for_a_failed_rank_is_broken_out(gang: Gang) -> None:
    before = gang.run(environment, 2)
    start = time.monotonic()
    errors = gang.run_expecting_errors(out_of_step, 2)
    assert time.monotonic() - start < 20
    assert errors[0] == ("KeyError", "'left early'")
    assert errors[1] is not None and errors[1][0] == "RuntimeError"
    assert gang.run(environment, 2) == before


@pytest.mark.faults
def test_a_hanging_rank_meets_the_deadline() -> None:
    with Gang(2) as gang:
        start = time.monotonic()
        gang.run(rank_sum, 2)
        with pytest.raises(GangError, match=r"(?s)rank 1 .*did not end before the deadline.*in sleep_on"):
            gang.run(sleep_on, 2, 1, 100.0, timeout=1)
        assert time.monotonic() - start < 60
        assert gang.run(rank_sum, 2) == [(0, 2, 3.0), (1, 2, 3.0)]


@pytest.mark.faults
def test_an_exiting_rank_is_noticed() -> None:
    with Gang(2) as gang:
        with pytest.raises(GangError, match=r"rank 1 of 2 in exit_on ended with exit code 7"):
            gang.run(exit_on, 2, 1, 7)
        assert gang.run(rank_sum, 2) == [(0, 2, 3.0), (1, 2, 3.0)]


def test_groups_made_in_a_case_end_with_it(gang: Gang) -> None:
    for _ in range(3):
        assert gang.run(new_groups, 2) == [32.0, 32.0]


def test_launch_makes_fresh_processes_and_sets_the_environment() -> None:
    assert launch(set_up_alone, 2, init=False, env={"FLAVOUR": "plum"}) == [(False, 2, "plum")] * 2


def test_launch_returns_what_became_of_each_rank() -> None:
    survivor, dead = launch(exit_on, 2, 1, 7, check=False)
    assert (dead.exit_code, dead.ok) == (7, False)
    assert survivor.error is not None and survivor.error[0] == "RuntimeError"


@pytest.mark.skipif(sys.platform != "linux", reason="exit codes of spawned processes as on Linux")
def test_launch_checks_the_exit_code() -> None:
    with pytest.raises(GangError, match="exit codes"):
        launch(leave_a_failing_exit, 1)


def test_more_ranks_than_processes_is_an_error(gang: Gang) -> None:
    with pytest.raises(ValueError, match="1 to 4 ranks, not 5"):
        gang.run(rank_sum, 5)
