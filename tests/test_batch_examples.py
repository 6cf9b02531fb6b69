r"""The examples of training on batches, run as their first lines say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import npz_path

from partpar import GraphData, datasets
from partpar.errors import GraphError, PartitionExistsError

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


def import_module_from(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nodes(tmp_path: Path) -> None:
    words = ("--nodes", "1000", "--epochs", "5", "--hidden", "32", "--batch-size", "16", "--dropout", "0")
    (*_, alone) = run(tmp_path, "train_mini_batch.py", None, *words)
    assert alone["val"] > 0.5, "of eight classes"


@pytest.mark.parametrize("script", ["train_mini_batch", "train_full_graph"])
def test_a_graph_of_torch_save_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    example = import_module_from(EXAMPLES / f"{script}.py")
    torch.save(datasets.planted(50, seed=3), tmp_path / "small.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--pt", "small.pt"])
    assert example.partition(example.parse(), 1) == "partitions/small/metis_1"
    assert GraphData.load_partition("partitions/small", 0, 1).num_owned() == 50
    torch.save(datasets.planted(60, seed=3), tmp_path / "small.pt")
    with pytest.raises(PartitionExistsError):
        example.partition(example.parse(), 1)
    sys.argv.append("--overwrite")
    example.partition(example.parse(), 1)
    assert GraphData.load_partition("partitions/small", 0, 1).num_owned() == 60
    torch.save({"not": print}, tmp_path / "small.pt")
    with pytest.raises(GraphError, match="expected a PyG graph"):
        example.partition(example.parse(), 1)


@pytest.mark.soak
def test_nodes_by_two_workers(tmp_path: Path) -> None:
    words = ("--nodes", "2000", "--epochs", "6", "--hidden", "32", "--batch-size", "16", "--dropout", "0")
    alone, together = (run(tmp_path, "train_mini_batch.py", workers, *words)[-1] for workers in (None, 2))
    assert together["val"] > 0.6
    assert abs(alone["val"] - together["val"]) < 0.1


@pytest.mark.soak
@pytest.mark.parametrize(("model", "workers", "least"), [("sage", 2, 0.7), ("hgt", 2, 0.7), ("rgcn", None, 0.9), ("rgcn", 2, 0.9)])
def test_types(tmp_path: Path, model: str, workers: int | None, least: float) -> None:
    path = str(npz_path("dblp_hetero"))
    records = run(tmp_path, "train_hetero.py", workers, "--npz", path, "--model", model, "--epochs", "8")
    assert max(record["val"] for record in records) >= least, records


@pytest.mark.soak
def test_links(tmp_path: Path) -> None:
    path = str(npz_path("collegemsg"))
    best: dict[int | None, list[float]] = {None: [], 2: []}
    for seed in range(3):
        for workers, found in best.items():
            (folder := tmp_path / f"{seed}").mkdir(exist_ok=True)
            words = ("--npz", path, "--epochs", "3", "--seed", str(seed))
            found.append(max(record["val"] for record in run(folder, "train_link_prediction.py", workers, *words)))
    spread = max(best[None]) - min(best[None])
    assert min(best[None] + best[2]) > 0.6, best
    assert abs(sum(best[None]) - sum(best[2])) / 3 <= max(spread, 0.02), best
