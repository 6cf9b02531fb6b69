r"""Errors in loaders and their parts, and what ended loaders leave."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gang import Worker, launch
from graphs import directed_graph
from loader_cases import SEEDS, may_have_children, open_share, parts
from torch_geometric.data import Data

from partpar.sampling import DistNeighborLoader

assert parts  # the fixture


def _fail(batch: Data) -> Data:
    if 3 in batch.input_id:
        raise ArithmeticError("of the transform")
    return batch


@pytest.mark.parametrize("concurrency", [0, 2])
def test_an_error_comes_where_its_batch_would(concurrency: int) -> None:
    loader = DistNeighborLoader(
        directed_graph(), [2], batch_size=1, transform=_fail, filter_per_worker=True, concurrency=concurrency
    )
    seen = 0
    with pytest.raises(ArithmeticError, match="of the transform"):
        for _ in loader:
            seen += 1
    assert seen == 3
    assert _threads() == []


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("partpar-loader")]


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def test_dropped_loaders_leave_nothing() -> None:
    data = directed_graph()

    def half(count: int) -> None:
        for _ in range(count):
            for number, _ in enumerate(DistNeighborLoader(data, [2], batch_size=5, concurrency=2)):
                if number == 3:
                    break

    half(2)
    before = threading.active_count(), _entries("/proc/self/fd")
    half(10)
    assert (threading.active_count(), _entries("/proc/self/fd")) == before


@pytest.mark.faults
def test_fifty_loaders_with_processes_leave_nothing(parts: str) -> None:
    launch(fifty_case, 2, parts, timeout=280)


def fifty_case(worker: Worker, root: str) -> None:
    import psutil

    may_have_children()
    share, me = open_share(worker, root), psutil.Process()

    def count() -> tuple[int, int, int, int]:
        return me.num_threads(), me.num_fds(), len(me.children(recursive=True)), _entries("/dev/shm")

    def half(count: int, **options: Any) -> None:
        for _ in range(count):
            loader = DistNeighborLoader(share, [2], SEEDS, batch_size=2, **options)
            iterator = iter(loader)
            for _ in range(3):
                next(iterator)
            del iterator, loader

    keep = DistNeighborLoader(share, [2], SEEDS, batch_size=2)  # so that the service stays
    half(2, concurrency=2)
    half(1, num_workers=1)
    time.sleep(1)
    before = count()
    half(46, concurrency=2)
    half(2, num_workers=1)
    time.sleep(1)
    after = count()
    assert all(b <= a + 2 for a, b in zip(before[:3], after[:3], strict=True)), (before, after)
    keep.close()


def error_of_rank_0(case: Callable[[Worker, str], None], parts: str) -> tuple[str, str]:
    r"""Kind and message of what two workers of a case, one of which fails, raise on the other."""
    start = time.monotonic()
    outcomes = launch(case, 2, parts, check=False, timeout=60)
    assert time.monotonic() - start < 60
    error = outcomes[0].error
    assert error is not None
    return error


@pytest.mark.faults
def test_a_failing_part_raises_in_the_training_loop(parts: str) -> None:
    kind, message = error_of_rank_0(failing_case, parts)
    assert kind in ("RemoteError", "SamplingError")
    assert "part 1" in message


def failing_case(worker: Worker, root: str) -> None:
    share = open_share(worker, root)
    loader = DistNeighborLoader(share, [3, 3], None, batch_size=8)
    if worker.rank == 1:
        share.csc = None  # type: ignore[assignment, method-assign]
        from partpar.serving import hop

        hop._kept.clear()
        time.sleep(5)
        return
    for _ in range(5):
        list(loader)


@pytest.mark.faults
def test_a_dead_part_raises_in_the_training_loop(parts: str) -> None:
    kind, message = error_of_rank_0(dying_case, parts)
    assert kind == "PeerLostError"
    assert "part 1" in message


def dying_case(worker: Worker, root: str) -> None:
    share = open_share(worker, root)
    loader = DistNeighborLoader(share, [3, 3], None, batch_size=8)
    list(loader)
    if worker.rank == 1:
        os._exit(3)
    while True:
        list(loader)
