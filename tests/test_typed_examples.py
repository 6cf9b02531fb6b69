r"""The examples of typed and temporal graphs, run as their first lines say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gang import Gang, Worker
from graphs import npz_path, typed_graph
from test_hetero import cut
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData
from partpar.errors import PartitionExistsError
from partpar.nn import global_mean

assert cut  # the fixture

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


def load(example: str) -> Any:
    r"""An example as a module."""
    spec = importlib.util.spec_from_file_location(example.removesuffix(".py"), EXAMPLES / example)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("example", "other", "message"),
    [
        ("train_snapshots.py", ("--snapshots", "5"), "other windows of time"),
        ("train_snapshots.py", ("--nodes", "240"), "found one made from another graph"),
        ("train_hetero_full_graph.py", ("--seed", "3"), "found one made from another graph"),
    ],
)
def test_a_partition_that_stands_is_replaced_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: str, other: tuple[str, ...], message: str
) -> None:
    module = load(example)

    def manifest(*words: str) -> bytes:
        monkeypatch.setattr(sys, "argv", [example, "--nodes", "200", "--root", str(tmp_path), *words])
        return Path(module.partition(module.parse(), 2), "manifest.json").read_bytes()

    before = manifest()
    assert manifest() == before
    with pytest.raises(PartitionExistsError, match=f"{message}.*--overwrite"):
        manifest(*other)
    assert manifest() == before
    assert manifest(*other, "--overwrite") != before


def typed_case(worker: Worker, root: Path | None) -> dict[str, list[float]]:
    r"""The example's classifier through DDP as it is by default: each weight must get a gradient in every part."""
    module, whole = load("train_hetero_full_graph.py"), GraphData.from_pyg_data(typed_graph())
    share = whole if root is None else GraphData.load_partition(root, worker.rank, worker.world_size, "given")
    route, owned, x = share.to_route(worker.group), share.node("a"), share.collect("x")
    losses: dict[str, list[float]] = {name: [] for name in module.MODELS}
    for name in losses:
        torch.manual_seed(0)
        options = SimpleNamespace(hidden=8, target="a", model=name)
        inner = module.Classifier(options, dict.fromkeys(x, 8), share.edge_types, 3).double()
        parallel = inner if root is None else DistributedDataParallel(inner, process_group=worker.group)
        optimizer = torch.optim.Adam(inner.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            rows = F.cross_entropy(parallel(x, share.adj_dict(), route), owned["y"], reduction="none")
            loss = global_mean(rows, owned["train_mask"], route)
            loss.backward()
            assert all(p.grad is not None for p in inner.parameters() if p.requires_grad)
            optimizer.step()
            losses[name].append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*balance")
def test_every_weight_of_the_classifier_is_trained_by_every_worker(gang: Gang, cut: Any) -> None:
    (alone,) = gang.run(typed_case, 1, None)
    # A part has no nodes, and only one has those of a certain type.
    for losses in gang.run(typed_case, 3, cut("generated", "given", 3)):
        for name, of_model in alone.items():
            assert losses[name] == pytest.approx(of_model, rel=1e-10)
            assert of_model[-1] < of_model[0]


@pytest.mark.soak
def test_snapshots_are_the_same_on_two_workers(tmp_path: Path) -> None:
    words = ("--npz", str(npz_path("bitcoin_otc")), "--epochs", "6")
    alone, two = (run("train_snapshots.py", tmp_path, workers, *words) for workers in (None, 2))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in alone], rel=1e-8)
    assert [r["auc"] for r in two] == pytest.approx([r["auc"] for r in alone], rel=1e-8)
    assert alone[-1]["loss"] < alone[0]["loss"]
    assert alone[-1]["auc"] > 0.6


@pytest.mark.soak
def test_typed_training_is_the_same_on_two_workers(tmp_path: Path) -> None:
    r"""Of one model; the others' weights are compared in the test before."""
    words = ("--nodes", "600", "--epochs", "8", "--model", "han")
    alone, two = (run("train_hetero_full_graph.py", tmp_path, workers, *words) for workers in (None, 2))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in alone], rel=1e-8)
    assert alone[-1]["loss"] < alone[0]["loss"]


@pytest.mark.soak
def test_typed_training_on_a_real_graph(tmp_path: Path) -> None:
    words = ("--npz", str(npz_path("dblp_hetero")), "--target", "author", "--epochs", "10")
    records = run("train_hetero_full_graph.py", tmp_path, 2, *words)
    assert records[-1]["test"] > 0.6
