r"""A worker is killed, stopped, crashes or raises, at each point of a step: what its peers do, and how soon."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import BOOM, Fault, Run, run

pytestmark = pytest.mark.faults

SECONDS = 30.0  # after the fault in which all must have ended
Measured = Callable[[str, float], None]
KINDS = {"kill": "SIGKILL", "segv": "SIGSEGV", "raise": "exception"}
PLACES = [
    ("full", "forward", 5),
    ("full", "backward", 5),
    ("full", "route.apply", 7),
    ("batches", "start", 1),
    ("batches", "sampling", 9),
    ("batches", "answer", 9),
    ("batches", "fetch", 9),
    ("tensor", "write", 5),
]


def all_ended(done: Run, but: int | None = None) -> None:
    for rank, worker in enumerate(done.workers):
        if rank != but:
            assert worker.code not in (None, 0), f"rank {rank} did not end, or said that all is well:\n{done}"
            assert "ended well" not in worker.text


@pytest.mark.parametrize("what", ["kill", "segv", "raise"])
@pytest.mark.parametrize(("how", "point", "call"), PLACES, ids=[place[1] for place in PLACES])
def test_a_worker_that_falls_takes_all_with_it(
    how: str, point: str, call: int, what: str, tmp_path: Path, measured: Measured
) -> None:
    done = run("train", 3, Fault(what, 1, point, call), how, str(tmp_path), "100000", timeout=90.0)
    all_ended(done)
    assert done.seconds_after < SECONDS, str(done)
    measured(KINDS[what], done.seconds_after)
    fallen, *others = done.workers[1], done.workers[0], done.workers[2]
    if point != "answer" or what != "raise":  # which is told to who asked, and that may be rank 0 or 2
        expected = {"kill": "", "segv": "Segmentation fault", "raise": f"ZeroDivisionError: {BOOM}"}[what]
        assert expected in fallen.text, str(done)
    cause = {"kill": "is gone", "segv": "is gone", "raise": "ZeroDivisionError"}[what]
    told = [w.text for w in others if re.search(r"(rank|part) 1\b", w.text) and cause in w.text]
    assert told, f"nobody names rank 1 and what befell it:\n{done}"
    for other in others:
        assert re.search(r"(RankLost|PeerLost|Remote)Error: .*(rank|part) \d", other.text), str(done)


@pytest.mark.parametrize("what", ["kill", "segv", "raise"])
def test_a_worker_that_falls_while_a_checkpoint_is_written(what: str, tmp_path: Path, measured: Measured) -> None:
    done = run("train", 3, Fault(what, 1, "checkpoint", 3), "saves", str(tmp_path), "100000", timeout=90.0)
    all_ended(done)
    assert done.seconds_after < SECONDS, str(done)
    measured(KINDS[what], done.seconds_after)
    told = rf"CheckpointWriteError: the checkpoint of step 3 was not written: rank 1: ZeroDivisionError: {BOOM}"
    if what != "raise":
        told = r"RankLostError: rank \d awaited others for [\d.]+ s in the checkpoint of step 3: rank 1 \(process \d+\) is gone"
    for other in (done.workers[0], done.workers[2]):
        assert re.search(told, other.text), str(done)


def test_the_fall_of_who_keeps_the_store(tmp_path: Path) -> None:
    done = run("train", 3, Fault("kill", 0, "route.apply", 7), "full", str(tmp_path), "100000", timeout=90.0)
    all_ended(done)
    assert done.seconds_after < SECONDS, str(done)
    for other in done.workers[1:]:
        assert re.search(r"RankLostError: .*rank 0 \(process \d+\) is gone", other.text), str(done)


@pytest.mark.parametrize(
    ("how", "point", "call", "rank"),
    [("full", "route.apply", 7, 1), ("full", "backward", 5, 0), ("batches", "sampling", 9, 1), ("tensor", "write", 5, 1),
     ("saves", "checkpoint", 3, 1)],
    ids=["route.apply", "backward of rank 0", "sampling", "write", "checkpoint"],
)
def test_a_worker_that_stops_is_named_after_the_timeout(
    how: str, point: str, call: int, rank: int, tmp_path: Path, measured: Measured
) -> None:
    timeout = 4
    done = run("train", 3, Fault("stop", rank, point, call), how, str(tmp_path), "100000", str(timeout), timeout=90.0)
    all_ended(done, but=rank)
    assert timeout <= done.seconds_after < SECONDS, str(done)
    measured(f"SIGSTOP, with a timeout of {timeout} s", done.seconds_after)
    assert done.workers[rank].code is None, "it was stopped, not ended"
    for other in (w for r, w in enumerate(done.workers) if r != rank):
        assert re.search(rf"(RankLost|PeerLost)Error: .*(rank|part) {rank}\b", other.text), str(done)
    assert any(f"rank {rank} (process " in w.text and "is stopped" in w.text for w in done.workers), str(done)


def test_without_a_fault_all_ends_well(tmp_path: Path) -> None:
    r"""So that the tests above see the fault, and not a script that never worked."""
    for how in ("full", "batches", "tensor"):
        done = run("train", 3, None, how, str(tmp_path / how), "20", timeout=90.0)
        assert [w.code for w in done.workers] == [0, 0, 0], str(done)
        assert all(w.last_line == "ended well" for w in done.workers)
