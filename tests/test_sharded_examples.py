r"""The examples on whole graphs and on nodes without features, run as their first lines say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from gang import Gang, Worker
from graphs import npz_path
from torch_geometric.data import Batch, Data

from partpar.graph.collection import GraphCollection
from partpar.nn.graph_batch import GraphBatch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, name: str, workers: int | None, *words: object, timeout: float = 150) -> list[dict]:
    launcher = [] if workers is None else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *map(str, words), "--metrics", "log.jsonl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    (folder / "log.jsonl").unlink(missing_ok=True)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert "mean" in done.stdout
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words", [[], ["--model", "gine", "--use_dist_embedding", "--use_dist_tensor"]]
)
@pytest.mark.soak
def test_graphs_are_classified_alike_by_any_number_of_workers(tmp_path: Path, words: list[str]) -> None:
    npz, small = npz_path("mutag"), ["--seeds", 0, "--folds", 2, "--epochs", 2, "--batch_size", 47, "--hidden_channels", 8, "--dropout", 0.2]
    small += ["--dtype", "float64"]
    alone, two = (run(tmp_path, "graph_classification", n, "--npz", npz, *small, *words) for n in (None, 2))
    for ours, theirs in zip(two[:-1], alone[:-1], strict=True):
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
    assert len(alone) == 3


@pytest.mark.parametrize(
    "words", [[], ["--no-use_dist_embedding", "--use_dist_tensor"]]
)
@pytest.mark.soak
def test_nodes_are_classified_alike_by_any_number_of_workers(tmp_path: Path, words: list[str]) -> None:
    npz = npz_path("pubmed_nofeat")
    small = ["--epochs", 5, "--dtype", "float64", "--hidden_channels", 8, "--embedding_dim", 8, "--optimiser", "adagrad"]
    alone, two = (run(tmp_path, "node_embedding", n, "--npz", npz, *small, *words) for n in (None, 2))
    for ours, theirs in zip(two[:-1], alone[:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    assert two[4]["loss"] < two[0]["loss"]


@pytest.mark.soak
def test_rows_are_trained_on_sampled_batches(tmp_path: Path) -> None:
    npz = npz_path("pubmed_nofeat")
    words = ["--npz", npz, "--epochs", 3, "--batch_size", 16, "--hidden_channels", 8, "--embedding_dim", 8]
    found = run(tmp_path, "node_embedding", 2, *words)
    assert found[2]["loss"] < found[0]["loss"]


@pytest.mark.soak
@pytest.mark.timeout(2000)
def test_gin_learns_mutag(tmp_path: Path) -> None:
    r"""Xu et al. (ICLR 2019) report 89.4 % for GIN-0 by this protocol."""
    found = run(tmp_path, "graph_classification", 2, "--npz", npz_path("mutag"), timeout=1900)[-1]["mean"]
    print(f"MUTAG, 10 folds, mean of 3 seeds: {found:.4f}")
    assert found >= 0.85


@pytest.mark.soak
@pytest.mark.timeout(4000)
def test_two_workers_learn_arxiv_as_one_does(tmp_path: Path) -> None:
    words = ["--npz", npz_path("ogbn_arxiv_nofeat"), "--undirected", "--seeds", 0, 1, 2, "--epochs", 12, "--lr", 0.03]
    words += ["--hidden_channels", 32, "--embedding_dim", 32]
    words += ["--dtype", "float64"]  # in float32 what is rounded otherwise has grown to a point by then
    means = {n: run(tmp_path, "node_embedding", n, *words, timeout=1900)[-1]["mean"] for n in (1, 2)}
    print(f"ogbn-arxiv without features, accuracy by workers, mean of 3 seeds: {means}")
    assert means[2] >= means[1] - 0.005
    assert means[1] > 0.25, "learned: the largest class has 16 %"


# --- batches of whole graphs ---------------------------------------------------------------------------------


def collection(seed: int = 0, num_graphs: int = 9) -> GraphCollection:
    draw = np.random.default_rng(seed)
    sizes, edges = draw.integers(1, 6, num_graphs), draw.integers(0, 9, num_graphs)
    ptr, edge_ptr = (torch.from_numpy(np.concatenate([[0], np.cumsum(n)])) for n in (sizes, edges))
    ends = [draw.integers(0, n, (2, e)) + start for n, e, start in zip(sizes, edges, ptr.tolist(), strict=False)]
    return GraphCollection(torch.from_numpy(np.concatenate(ends, 1)), ptr, edge_ptr, torch.arange(num_graphs) % 2)


def deal(worker: Worker, chosen: torch.Tensor) -> GraphBatch:
    batch = GraphBatch.deal(collection(), chosen, worker.group)
    assert batch.route.world_size == worker.world_size
    return GraphBatch(batch.nodes, batch.edges, batch.edge_index, batch.batch, batch.y, None)  # type: ignore[arg-type]


@pytest.mark.core_on(2)
def test_batches_are_those_of_pyg(gang: Gang, world_size: int) -> None:
    graphs, chosen = collection(), torch.tensor([7, 2, 2, 5, 0])
    parts = [
        Data(edge_index=graphs.edge_index[:, a:b] - n, num_nodes=m - n, number=torch.arange(n, m))
        for g in chosen.tolist()
        for n, m, a, b in [(*graphs.node_ptr[g : g + 2].tolist(), *graphs.edge_ptr[g : g + 2].tolist())]
    ]
    expected, dealt = Batch.from_data_list(parts), gang.run(deal, world_size, chosen)
    assert torch.equal(torch.cat([batch.nodes for batch in dealt]), expected.number)
    assert torch.equal(torch.cat([batch.batch for batch in dealt]), expected.batch)
    shift, ends = 0, []
    for batch in dealt:
        assert torch.equal(batch.y, graphs.y[chosen])
        ends.append(batch.edge_index + shift)
        shift += len(batch.nodes)
    assert torch.equal(torch.cat(ends, 1), expected.edge_index)
    counts = [len(batch.batch.unique()) for batch in dealt]
    assert max(counts) - min(counts) <= 1
    assert mean(counts) == 5 / world_size


@pytest.mark.parametrize(("words", "columns"), [([], 3), (["--use_node_attr"], 5)])
def test_nodes_are_known_by_their_labels_unless_attributes_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str], columns: int
) -> None:
    graphs = collection()
    num_nodes = int(graphs.node_ptr[-1])
    graphs = replace(graphs, node_label=torch.arange(num_nodes) % 3, node_attr=torch.full((num_nodes, 2), 800.0))
    example = runpy.run_path(str(EXAMPLES / "graph_classification.py"))
    monkeypatch.setattr(sys, "argv", ["graph_classification.py", "--npz", "some.npz", *words])
    rows = example["inputs"](example["parse"](), graphs, torch.tensor([1, 5]))
    assert rows.tolist() == [[0, 1, 0, 800, 800][:columns], [0, 0, 1, 800, 800][:columns]]


def test_a_file_without_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none there"):
        GraphCollection.from_npz(tmp_path / "none.npz")
    np.savez(tmp_path / "few.npz", y=np.arange(3))
    with pytest.raises(ValueError, match="found no edge_index, node_ptr, edge_ptr"):
        GraphCollection.from_npz(tmp_path / "few.npz")
    np.savez(
        tmp_path / "far.npz", y=np.arange(1), edge_index=np.array([[5], [0]]), node_ptr=np.array([0, 2]), edge_ptr=np.array([0, 1])
    )
    with pytest.raises(ValueError, match="expected edge_index .* of numbers below 2"):
        GraphCollection.from_npz(tmp_path / "far.npz")
