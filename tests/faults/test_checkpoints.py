r"""Kills while checkpoints are written, and jobs that torchrun starts anew."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import npz_path

from partpar.training import Checkpointer
from partpar.training.checkpoint_files import steps_in

pytestmark = pytest.mark.faults

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.1",
]  # fmt: skip


def start(command: list[Any], folder: Path, kill: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PARTPAR_TEST_KILL": kill}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=150
    )


# --- while a checkpoint is written ----------------------------------------------------------------------------------

# The third save's file, marker or rename. Pruning renames too: from the third save on, after the new one stands.
KILLS = {"write:0:3": 2, "marker:0:3": 2, "rename:0:3": 2, "renamed:0:3": 3, "rename:0:4": 3, "renamed:0:4": 3}


@pytest.mark.timed("kill while a checkpoint is written, before and after its rename")
@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_leaves_whole_checkpoints(kill: str, tmp_path: Path) -> None:
    done = start([sys.executable, HERE / "killed_child.py", HERE / "saving_child.py", tmp_path], tmp_path, kill)
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest = KILLS[kill]
    assert steps_in(tmp_path)[-1] == newest
    module = torch.nn.Linear(4, 4)
    with Checkpointer(tmp_path, {"module": module}, resume=True) as checkpoints:
        assert not list(tmp_path.glob(".step*")), "what was cut short is gone"
        assert checkpoints.resume() == {"name": f"of step {newest}"}
        assert checkpoints.step == newest
        assert set(module.weight.flatten().tolist()) == {newest}
        checkpoints.save(newest + 1)
    assert steps_in(tmp_path)[-1] == newest + 1


# --- started anew ---------------------------------------------------------------------------------------------------

FULL_GRAPH = [
    "train_full_graph.py", "--nodes", "300", "--hidden", "16", "--dtype", "float64", "--epochs", "10",
]  # fmt: skip
MINI_BATCH = [
    "train_mini_batch.py", "--nodes", "800", "--hidden", "16", "--dtype", "float64", "--epochs", "6", "--batch-size", "10",
]  # fmt: skip
EMBEDDING = [
    "node_embedding.py", "--npz", npz_path("pubmed_nofeat"), "--embedding_dim", "8", "--hidden_channels", "8",
    "--dtype", "float64", "--epochs", "8",
]  # fmt: skip


def records(path: Path) -> list[dict[str, float]]:
    return [record for line in path.read_text().splitlines() if "loss" in (record := json.loads(line))]


@pytest.fixture(scope="module")
def without_a_kill(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    r"""The folder where an example ran, once: its partition, and ``whole.jsonl`` of its epochs."""

    @functools.cache
    def run(script: str, *words: Any) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        done = start([*TORCHRUN, EXAMPLES / script, *words, "--metrics", "whole.jsonl"], folder)
        assert done.returncode == 0, done.stderr
        return folder

    return run


@pytest.mark.timed("kill in a job that torchrun starts anew, until it has ended")
@pytest.mark.parametrize(
    ("example", "kill", "rank"),
    [(FULL_GRAPH, "step", 1), (FULL_GRAPH, "write", 1), (FULL_GRAPH, "rename", 0), (MINI_BATCH, "step", 1), (EMBEDDING, "step", 0)],
    ids=["full graph", "full graph, while writing", "full graph, before the rename", "mini-batches", "sharded rows"],
)
def test_a_job_started_anew_ends_as_one_that_never_stopped(
    without_a_kill: Any, example: list[str], kill: str, rank: int, tmp_path: Path
) -> None:
    script, *words = example
    whole = without_a_kill(*example)
    shutil.copytree(whole / "partitions", tmp_path / "partitions")  # its files and renames are not those to be killed at
    expected = {record["epoch"]: record for record in records(whole / "whole.jsonl")}

    # A step beyond the second checkpoint (an epoch has four or five batches), or its file, or its rename.
    call = {"write": 2, "rename": 2, "step": 22 if example is MINI_BATCH else 6}[kill]
    checkpoints = ["--checkpoint-dir", "checkpoints", "--checkpoint-every", "2", "--resume"]
    command = [*TORCHRUN, "--max-restarts", "2", HERE / "killed_child.py", EXAMPLES / script, *words, *checkpoints]
    broken = start([*command, "--metrics", "broken.jsonl"], tmp_path, f"{kill}:{rank}:{call}")
    assert broken.returncode == 0, broken.stderr
    found = records(tmp_path / "broken.jsonl")
    again = [b["epoch"] for a, b in pairwise(found) if b["epoch"] <= a["epoch"]]
    assert (tmp_path / "killed").exists()
    assert not again or again[0] > 1, "it went on, and did not begin anew"
    last = {record["epoch"]: record for record in found}
    assert last.keys() == expected.keys()
    for epoch, record in expected.items():
        assert last[epoch]["loss"] == pytest.approx(record["loss"], rel=1e-10, abs=1e-10)
        for split in ("train", "val", "test"):
            assert last[epoch][split] == pytest.approx(record[split], abs=1e-10)

