r"""What a long run leaves behind in its own processes: nothing; and that busy cores make a run slow, not wrong."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import Run, run
from graphs import directed_graph

from partpar import GraphData

pytestmark = pytest.mark.faults

STEPS, LOADERS, RUNS = 2000, 50, 20


def grown(folder: Path, *words: str) -> list[dict[str, float]]:
    r"""Of each of two workers, how much more it held at the end than after its warm-up; bytes as a share of these."""
    GraphData.from_pyg_data(directed_graph()).partition_graph(folder, 2, algorithm="random")
    done = run("growth", 2, None, str(folder), *words, timeout=200.0)
    assert [worker.code for worker in done.workers] == [0, 0], str(done)
    found = []
    for worker in done.workers:
        before, after = (json.loads(line) for line in worker.text.splitlines() if line.startswith("{"))
        more = {name: float(after[name] - before[name]) for name in before}
        found.append({**more, "resident bytes": more["resident bytes"] / before["resident bytes"]})
    return found


@pytest.mark.timed("2,000 steps and 50 loaders")
def test_steps_and_loaders_leave_nothing(tmp_path: Path) -> None:
    for more in grown(tmp_path, str(STEPS), str(LOADERS)):
        assert more.pop("resident bytes") < 0.02
        assert max(more.values()) <= 0, more


def test_what_is_kept_would_be_seen(tmp_path: Path) -> None:
    r"""The mutant of the test above: iterators that are kept, and 128 KiB a step."""
    for more in grown(tmp_path, "200", "12", "leaking"):
        assert min(more[name] for name in ("threads", "file descriptors")) > 0 and more["processes"] > 1, more
        assert more["resident bytes"] > 0.02, more


def burn(until: float) -> None:
    while time.monotonic() < until:
        pass


@pytest.mark.timed("10 of 20 runs of four workers on busy cores")
@pytest.mark.parametrize("half", ["first ten", "last ten"])
def test_runs_of_four_workers_on_busy_cores_end_well(half: str, tmp_path: Path) -> None:
    r"""Two runs at a time, beside two programs that do nothing but take time of the processor."""
    context = multiprocessing.get_context("spawn")
    load = [context.Process(target=burn, args=(time.monotonic() + 280,), daemon=True) for _ in range(2)]
    for process in load:
        process.start()

    def one(number: int) -> Run:
        return run("train", 4, None, "full+batches+tensor", str(tmp_path / str(number)), "4", "60", timeout=100.0)

    try:
        with ThreadPoolExecutor(2) as two:
            for number, done in enumerate(two.map(one, range(RUNS // 2))):
                assert [worker.code for worker in done.workers] == [0] * 4, f"run {number} of the {half}:\n{done}"
                assert all(worker.last_line == "ended well" for worker in done.workers), str(done)
        assert all(process.is_alive() for process in load), "the cores were not busy"
    finally:
        for process in load:
            process.kill()
            process.join()
