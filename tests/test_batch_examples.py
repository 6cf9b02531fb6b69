r"""The examples of training on batches, run as their first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import npz_path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, script: str, workers: int | None, *words: str) -> list[dict[str, float]]:
    r"""What each epoch wrote."""
    launcher = [] if workers is None else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, *launcher, str(EXAMPLES / script), *words, "--metrics", f"{workers}.jsonl"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "RPC agent" not in done.stderr, "it ends without torch's warnings of connections that close"
    assert "last loss" in done.stdout
    return [json.loads(line) for line in (folder / f"{workers}.jsonl").read_text().splitlines()]


def test_nodes(tmp_path: Path) -> None:
    words = ("--nodes", "1000", "--epochs", "5", "--hidden", "32", "--batch-size", "16", "--dropout", "0")
    (*_, alone) = run(tmp_path, "train_mini_batch.py", None, *words)
    assert alone["val"] > 0.5, "of eight classes"


@pytest.mark.soak
def test_nodes_by_two_workers(tmp_path: Path) -> None:
    words = ("--nodes", "2000", "--epochs", "6", "--hidden", "32", "--batch-size", "16", "--dropout", "0")
    alone, together = (run(tmp_path, "train_mini_batch.py", workers, *words)[-1] for workers in (None, 2))
    assert together["val"] > 0.6
    assert abs(alone["val"] - together["val"]) < 0.1


@pytest.mark.soak
@pytest.mark.parametrize("model", ["sage", "rgcn", "hgt"])
def test_types(tmp_path: Path, model: str) -> None:
    path = str(npz_path("dblp_hetero"))
    for workers in (None, 2):
        records = run(tmp_path, "train_hetero.py", workers, "--npz", path, "--model", model, "--epochs", "8")
        assert max(record["val"] for record in records) >= 0.9, records


@pytest.mark.soak
def test_links(tmp_path: Path) -> None:
    path = str(npz_path("collegemsg"))
    best = {}
    for workers in (None, 2):
        records = run(tmp_path, "train_link_prediction.py", workers, "--npz", path, "--epochs", "4")
        best[workers] = max(record["val"] for record in records)
    assert min(best.values()) > 0.6, best
    assert abs(best[None] - best[2]) < 0.05, best
