r"""The examples of typed and temporal graphs, run as their first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import npz_path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(example: str, folder: Path, workers: int | None, *words: str) -> list[dict[str, float]]:
    launcher = (
        []
        if workers is None
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    )
    command = [sys.executable, *launcher, str(EXAMPLES / example), "--dtype", "float64", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.soak
@pytest.mark.parametrize("words", [(), ("bitcoin_otc",)], ids=["generated", "bitcoin_otc"])
def test_snapshots_are_the_same_on_two_workers(tmp_path: Path, words: tuple[str, ...]) -> None:
    more = ("--npz", str(npz_path(words[0])), "--epochs", "6") if words else ("--nodes", "300", "--epochs", "6")
    alone, two = (run("train_snapshots.py", tmp_path, workers, *more) for workers in (None, 2))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in alone], rel=1e-8)
    assert [r["auc"] for r in two] == pytest.approx([r["auc"] for r in alone], rel=1e-8)
    assert alone[-1]["loss"] < alone[0]["loss"]
    assert not words or alone[-1]["auc"] > 0.6


@pytest.mark.soak
@pytest.mark.parametrize("model", ["rgcn", "sage", "hgt", "han"])
def test_typed_training_is_the_same_on_two_workers(tmp_path: Path, model: str) -> None:
    words = ("--nodes", "600", "--epochs", "8", "--model", model)
    alone, two = (run("train_hetero_full_graph.py", tmp_path, workers, *words) for workers in (None, 2))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in alone], rel=1e-8)
    assert alone[-1]["loss"] < alone[0]["loss"]


@pytest.mark.soak
def test_typed_training_on_a_real_graph(tmp_path: Path) -> None:
    words = ("--npz", str(npz_path("dblp_hetero")), "--target", "author", "--epochs", "10")
    records = run("train_hetero_full_graph.py", tmp_path, 2, *words)
    assert records[-1]["test"] > 0.6
