r"""The scale benchmark on a small graph, and that its search for whole-graph tensors finds some."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from partpar import GraphData

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_graph_is_what_it_says(
    scale: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "CHUNK", 1000)
    scale.generate(tmp_path / "graph", 4000, 30_000)
    graph = GraphData.open(tmp_path / "graph")
    graph.validate()
    assert (graph.num_nodes(), graph.num_edges()) == (4000, 30_000)
    src, dst = graph.edge_index()
    keys, back = (src * 4000 + dst).sort().values, (dst * 4000 + src).sort().values
    assert torch.equal(keys, back), "both directions of each edge"
    y = graph.node("dst")["y"]
    # A community has one class, and an edge that goes anywhere comes back to it one time in 16.
    assert (y[src] == y[dst]).double().mean() == pytest.approx(0.95 + 0.01 / 16, abs=0.02)
    assert y.bincount(minlength=16).tolist() == [400] * 4 + [200] * 12
    assert graph.node("dst")["train_mask"].double().mean() == pytest.approx(0.1, abs=0.02)


def test_the_search_sees_tensors_arrays_and_what_lives_for_an_instant(scale: ModuleType) -> None:
    n = 12_347
    before = scale.whole_graph_shapes(n)  # whatever the rest of this process holds, of any size
    kept = {"tensor": torch.zeros(n, 2, 3), "array": [np.zeros((3, 5, n + 1))]}
    assert scale.whole_graph_shapes(n) - before == {(n, 2, 3), (3, 5, n + 1)}
    del kept
    assert scale.whole_graph_shapes(n) <= before
    with scale.Watch(n) as watch:
        (torch.ones(n - 1).sum() + torch.ones(3)).sum()
        assert not watch.shapes
        x = torch.ones(2, requires_grad=True)
        x.sum().expand(n).clone().sum().backward()
    assert watch.shapes == {(n,)}


@pytest.mark.soak
def test_the_benchmark_runs(tmp_path: Path) -> None:
    words = [
        "--nodes",
        "6000",
        "--edges",
        "60000",
        "--workers",
        "2",
        "--algorithms",
        "ldg",
        "--max-ratio",
        "1.5",
    ]
    more = [
        "--json",
        str(tmp_path / "rows.json"),
        "--rst",
        str(tmp_path / "page.rst"),
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, str(FILE), *words, *more], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    alone, together = found["rows"]
    assert alone["spanning"][0] > 0
    assert together["spanning"] == [0, 0]
    assert all(found["claims"].values())
    page = (tmp_path / "page.rst").read_text()
    assert "6,000 nodes and 60,000 edges" in page
    assert "2 workers, ldg" in page
