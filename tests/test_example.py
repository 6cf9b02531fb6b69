r"""The example, run as its first lines say, and that models learn what is known to be learnable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from gang import Gang
from graphs import npz_path
from partpar.models import GCN, GraphSAGE
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, datasets, training

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_full_graph.py"
SMALL = ["--nodes", "300", "--hidden", "16", "--epochs", "8", "--dtype", "float64"]


def _run(folder: Path, workers: int | None, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = (
        []
        if workers is None
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, *launcher, str(EXAMPLE), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)


def _records(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(lines[-1]) == {"phase_seconds", "traffic", "peak_bytes"}, "figures of all ranks stand at the end"
    return lines[:-1]


def test_one_process_and_two_workers_train_alike(tmp_path: Path) -> None:
    losses = {}
    for workers in (None, 2):
        done = _run(tmp_path, workers, *SMALL, "--model", "sage", "--metrics", f"{workers}.jsonl")
        assert done.returncode == 0, done.stderr
        for row in (
            "accuracy, train",
            "accuracy, val",
            "accuracy, test",
            "epoch time",
            "rank 0: time in exchange",
        ):
            assert row in done.stdout
        losses[workers] = [record["loss"] for record in _records(tmp_path / f"{workers}.jsonl")]
    assert "rank 1: peak memory" in done.stdout
    assert "2 worker(s) on cpu, gloo" in done.stderr
    assert len(losses[2]) == 8
    assert losses[2] == pytest.approx(losses[None], rel=1e-10)
    assert losses[2][-1] < losses[2][0]
    assert sorted(path.name for path in (tmp_path / "partitions" / "planted").iterdir()) == [
        "metis_1",
        "metis_2",
    ]


@pytest.mark.soak
def test_a_run_that_is_at_its_end_ends_at_once_when_resumed(tmp_path: Path) -> None:
    words = [*SMALL, "--checkpoint-dir", "kept", "--resume", "--metrics", "run.jsonl"]
    first, again = (_run(tmp_path, 2, *words) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    facts = [[line for line in done.stdout.splitlines() if "accuracy" in line or "last loss" in line] for done in (first, again)]
    assert len(facts[0]) == 4
    assert facts[0] == facts[1]
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 8, "no epoch was trained twice"


@pytest.mark.soak
@pytest.mark.parametrize("model", ["gcn", "gat", "gin", "simple"])
def test_every_model_trains(model: str, tmp_path: Path) -> None:
    norm = [] if model == "simple" else ["--norm", "batch_norm"]
    words = [
        "--model",
        model,
        *norm,
        "--dataset",
        "karate",
        "--metric",
        "auc",
        "--algorithm",
        "ldg",
        "--patience",
        "3",
    ]
    done = _run(
        tmp_path, None, *words, "--epochs", "40", "--hidden", "8", "--normalize", "--metrics", "log.jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert "ROC AUC, test" in done.stdout
    records = _records(tmp_path / "log.jsonl")
    best = max(range(len(records)), key=lambda i: (records[i]["val"], -i))
    assert len(records) == min(40, best + 1 + 3), "patience counts from the best epoch"


@pytest.mark.faults
def test_a_cut_that_fails_on_rank_0_ends_every_rank(tmp_path: Path) -> None:
    done = _run(tmp_path, 2, "--npz", "none.npz")
    assert done.returncode == 1
    assert "GraphError: none.npz: expected an .npz file of arrays, found none there" in done.stderr


@pytest.mark.soak
def test_another_partition_is_not_replaced_unasked(tmp_path: Path) -> None:
    assert _run(tmp_path, None, *SMALL).returncode == 0
    refused = _run(tmp_path, None, *SMALL, "--seed", "1")
    assert refused.returncode == 1
    assert "PartitionExistsError" in refused.stderr
    assert _run(tmp_path, None, *SMALL, "--seed", "1", "--overwrite").returncode == 0


# --- learning
# -----------------------------------------------------------------------------------------------------


def _train(worker: Any, root: str, recipe: dict[str, Any], seed: int) -> tuple[float, list[float]]:
    r"""Trains on a partition; returns the test metric at the best validation epoch, and the losses."""
    share = GraphData.load_partition(root, worker.rank, worker.world_size)
    route, owned = share.to_route(worker.group), share.node("dst")
    if recipe.get("normalize"):
        owned["x"] = owned["x"] / owned["x"].sum(dim=1, keepdim=True).clamp(min=1)
    owned["x"] = owned["x"].to(recipe["dtype"])
    torch.manual_seed(seed)
    sizes = (owned["x"].size(1), recipe["hidden"], recipe["layers"], recipe["classes"])
    model = recipe["model"](*sizes, dropout=recipe["dropout"], seed=seed, **recipe.get("options", {}))
    model = model.to(recipe["dtype"])
    # As in the paper, weight decay is for the first layer alone.
    groups = [
        {"params": model.convs[0].parameters(), "weight_decay": recipe["decay"]},
        {"params": model.convs[1:].parameters()},
    ]
    trained = DistributedDataParallel(model, process_group=worker.group) if worker.world_size > 1 else model
    optimizer = torch.optim.Adam(groups, lr=0.01)
    history = training.fit(trained, optimizer, share, route, recipe["epochs"], metric=recipe["metric"])
    assert history.best is not None
    return history.best.test, history.losses


@pytest.fixture(scope="module")
def cora(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("cora")
    graph = GraphData.from_pyg_data(datasets.from_npz(npz_path("cora")))
    for num_parts in (2, 4):
        graph.partition_graph(root, num_parts)
    return str(root)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [2, 4])
def test_gcn_learns_cora(gang: Gang, cora: str, workers: int) -> None:
    r"""Kipf and Welling (ICLR 2017) report 81.5 % on this split."""
    recipe = {
        "model": GCN, "hidden": 16, "layers": 2, "classes": 7, "dropout": 0.5, "decay": 5e-4, "epochs": 100,
        "metric": "accuracy", "dtype": torch.float32, "normalize": True, "options": {"cached": True},
    }  # fmt: skip
    accuracies = []
    for seed in range(5):
        results = gang.run(_train, workers, cora, recipe, seed, timeout=120)
        assert len({accuracy for accuracy, _ in results}) == 1, "every rank has the same metric"
        accuracies.append(results[0][0])
    assert mean(accuracies) >= 0.805, accuracies


@pytest.mark.soak
def test_sage_learns_tolokers_as_one_process_does(gang: Gang, tmp_path: Path) -> None:
    data = datasets.from_npz(npz_path("tolokers"))
    graph = GraphData.from_pyg_data(data)
    recipe = {
        "model": GraphSAGE, "hidden": 16, "layers": 2, "classes": 2, "dropout": 0.2, "decay": 0.0,
        "epochs": 15, "metric": "auc", "dtype": torch.float64,
    }  # fmt: skip
    results = {}
    for workers in (1, 2):
        graph.partition_graph(tmp_path, workers)
        results[workers] = gang.run(_train, workers, str(tmp_path), recipe, 0, timeout=120)[0]
    (alone, losses), (together, losses_together) = results[1], results[2]
    assert losses_together == pytest.approx(losses, rel=1e-10)
    assert together == pytest.approx(alone, abs=1e-6)
    assert together > 0.65, "better than chance"
