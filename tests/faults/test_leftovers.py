r"""What an earlier run that was killed left there: it is cleared away, is in nobody's way, or is named."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from faults import Fault, free_port, run

pytestmark = pytest.mark.faults


@pytest.mark.timed("a port that is taken, with a timeout of 8 s")
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("train", 2, None, "full", str(tmp_path), "3", "8", timeout=60.0, env={"MASTER_PORT": port})
    assert all(worker.code not in (None, 0) for worker in done.workers), str(done)
    assert re.search(rf"SetupError: .*port {port} is in use", done.workers[0].text), str(done)
    assert f"no answer at 127.0.0.1:{port}" in done.workers[1].text or "SetupError" in done.workers[1].text, str(done)


@pytest.mark.timed("a run after two that were killed")
def test_a_run_after_one_that_was_killed_starts_clean(tmp_path: Path) -> None:
    r"""On the same port, with the same folder: first while the partition is written, then in training."""
    env = {"MASTER_PORT": str(free_port())}
    for fault in (Fault("kill", 0, "rename", 1), Fault("kill", 0, "route.apply", 3)):
        fallen = run("train", 2, fault, "full", str(tmp_path), "10", "10", timeout=60.0, env=env)
        assert all(worker.code not in (None, 0) for worker in fallen.workers), str(fallen)
    done = run("train", 2, None, "full", str(tmp_path), "10", timeout=60.0, env=env)
    assert [worker.code for worker in done.workers] == [0, 0], str(done)


def children_of(processes: list[subprocess.Popen]) -> list[psutil.Process]:
    return [child for process in processes for child in psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.timed("Ctrl-C after 12 s, until all have ended")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_leaves_nothing(number: int, tmp_path: Path) -> None:
    before = {path.name for path in Path("/tmp").glob("partpar-*")} | {path.name for path in Path("/dev/shm").iterdir()}
    seen: list[psutil.Process] = []

    def interrupt(processes: list[subprocess.Popen]) -> None:
        time.sleep(12)
        seen.extend(children_of(processes))
        for process in processes:
            process.send_signal(number)

    done = run("train", 2, None, "batches", str(tmp_path), "1000000", timeout=60.0, meanwhile=interrupt)
    assert all(worker.code not in (None, 0) for worker in done.workers), str(done)
    assert all("step " in worker.text for worker in done.workers), "it was in the midst of training"
    assert not [process for process in seen if process.is_running()]
    after = {path.name for path in Path("/tmp").glob("partpar-*")} | {path.name for path in Path("/dev/shm").iterdir()}
    assert not {name for name in after - before if name.startswith(("partpar", "torch_", "psm_"))}


@pytest.mark.timed("Ctrl-C after 10 s, while a worker is awaited")
def test_ctrl_c_while_a_worker_is_awaited(tmp_path: Path) -> None:
    r"""Others wait for rank 1 in the start of the service, which it does not live to see."""

    def interrupt(processes: list[subprocess.Popen]) -> None:
        time.sleep(10)
        for process in processes:
            process.send_signal(signal.SIGINT)

    fault = Fault("delay", 1, "start", 1, seconds=60)
    done = run("train", 3, fault, "batches", str(tmp_path), "1000000", timeout=50.0, meanwhile=interrupt)
    assert all(worker.code not in (None, 0) for worker in done.workers), str(done)
    assert not any("step " in worker.text for worker in done.workers), str(done)
