r"""Ctrl-C in the midst of batches: every process ends, soon, and says why."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from graphs import directed_graph

from partpar import GraphData

SCRIPT = """
import sys
from partpar import GraphData, training
from partpar.sampling import DistNeighborLoader

if __name__ == "__main__":
    with training.init(timeout=20, quiet=True) as worker:
        share = GraphData.load_partition(sys.argv[1], worker.rank, worker.world_size, "random")
        loader = DistNeighborLoader(share, [3, 3], batch_size=8, num_workers=int(sys.argv[2]), timeout=60)
        while True:
            for number, batch in enumerate(loader):
                if number == 1:
                    print("batches", flush=True)
"""


def start(folder: Path, num_workers: int) -> list[subprocess.Popen[str]]:
    r"""Two workers, each in a session of its own, that have made batches."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(folder), str(num_workers)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env={**os.environ, **place}, start_new_session=True, **pipes))
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "batches\n", process.communicate()[1]
    return processes


def left(session: int) -> bool:
    r"""Whether any process of a session still runs."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.faults
@pytest.mark.parametrize(("num_workers", "interrupted"), [(0, 2), (2, 2), (0, 1)])
def test_every_process_ends_and_says_why(tmp_path: Path, num_workers: int, interrupted: int) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2, algorithm="random")
    processes = start(tmp_path, num_workers)
    begin = time.monotonic()
    try:
        for process in processes[2 - interrupted :]:
            os.killpg(process.pid, signal.SIGINT)
        told = [process.communicate(timeout=30)[1] for process in processes]
        assert time.monotonic() - begin < 30
        assert "KeyboardInterrupt" in told[1]
        if interrupted == 1:  # the other is told whom it lost
            assert "worker-1" in told[0] or "rank 1" in told[0], told[0]
        else:
            assert "KeyboardInterrupt" in told[0]
        assert all(process.returncode != 0 for process in processes)
        while any(left(process.pid) for process in processes):  # those that made batches end with them
            assert time.monotonic() - begin < 30
            time.sleep(0.1)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
