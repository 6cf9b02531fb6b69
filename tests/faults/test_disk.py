r"""A full disk, or a kill, while files are written: what stood there before stands, and is whole."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import Fault, run
from graphs import directed_graph

from partpar import GraphData
from partpar.errors import CheckpointWriteError
from partpar.training import Checkpointer, JsonLines
from partpar.training.run_log import read_runs

pytestmark = pytest.mark.faults


def whole(root: Path, seed: int) -> bool:
    r"""Whether the partition there is that of the graph of a seed, with all checksums right."""
    graph = directed_graph(seed=seed)
    for part in range(2):
        share = GraphData.load_partition(root, part, 2, algorithm="random")
        if not torch.equal(share.node("dst")["x"][:], graph.x[share.node("dst")["raw_ids"][:]]):
            return False
    return True


@pytest.mark.timed("kill while a partition is replaced, and the next run")
@pytest.mark.parametrize(
    ("function", "call", "after", "left"),
    [("_write_tensors", 1, True, 0), ("_write_tensors", 2, False, 0), ("_publish", 1, False, 0), ("_swap", 1, True, 1),
     ("_publish", 1, True, 1)],
    ids=["after a share", "in the next", "before the rename", "after the rename", "after all is on the disk"],
)  # fmt: skip
def test_a_kill_while_a_partition_is_replaced(function: str, call: int, after: bool, left: int, tmp_path: Path) -> None:
    GraphData.from_pyg_data(directed_graph(seed=0)).partition_graph(tmp_path, 2, algorithm="random")
    fault = Fault("kill", 0, f"partpar.partition.write:{function}", call, after=after)
    assert run("replace", 1, fault, str(tmp_path), "1").workers[0].code == -signal.SIGKILL
    assert whole(tmp_path, left) and not whole(tmp_path, 1 - left)
    assert run("replace", 1, None, str(tmp_path), "1").workers[0].code == 0, "the next one starts clean"
    assert whole(tmp_path, 1)


def test_the_swap_is_needed(tmp_path: Path) -> None:
    r"""The mutant of the test above: between two renames, there is no partition."""
    GraphData.from_pyg_data(directed_graph(seed=0)).partition_graph(tmp_path, 2, algorithm="random")
    done = run("replace", 1, Fault("kill", 0, "rename", 1, after=True), str(tmp_path), "1", "by two renames")
    assert done.workers[0].code == -signal.SIGKILL, str(done)
    assert not (tmp_path / "random_2").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    r"""A file system of 600 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("this user may not mount a file system that is soon full")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=60)


@pytest.mark.timed("full disk while shares are written")
def test_shares_on_a_full_disk(disk: Path) -> None:
    GraphData.from_pyg_data(directed_graph(seed=0)).partition_graph(disk, 2, algorithm="random")
    large = GraphData.from_pyg_data(directed_graph(seed=1, num_nodes=20_000))
    with pytest.raises(OSError, match="No space left on device"):
        large.partition_graph(disk, 2, algorithm="random", overwrite=True)
    assert whole(disk, 0)
    assert [path.name for path in disk.iterdir() if path.name.startswith(".random")] == []


@pytest.mark.timed("full disk while a log and a checkpoint are written")
def test_a_log_on_a_full_disk(disk: Path) -> None:
    r"""Whole lines stay, the error names the file, and so does the checkpoint beside."""
    log, filler = JsonLines(disk / "log.jsonl"), disk / "filler"
    module = torch.nn.Linear(4, 4)
    with Checkpointer(disk / "checkpoints", {"module": module}) as checkpoints:
        checkpoints.save(1)
        checkpoints.wait()
        log.write(epoch=1, loss=0.5)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        with pytest.raises(OSError, match="No space left") as told:
            for epoch in range(2, 1000):
                log.write(epoch=epoch, loss=0.5, note="x" * 100)
        assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(disk / "log.jsonl"))
        module.register_buffer("more", torch.zeros(1000))
        with pytest.raises(CheckpointWriteError, match="No space left"):
            checkpoints.save(2)
            checkpoints.wait()
    lines = (disk / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(read_runs(disk / "log.jsonl")[0].epochs) == len(lines) > 1
    filler.unlink()
    with Checkpointer(disk / "checkpoints", {"module": torch.nn.Linear(4, 4)}, resume=True) as checkpoints:
        checkpoints.resume()
        assert checkpoints.step == 1
