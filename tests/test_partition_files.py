r"""Partitions on disk: shares tile the graph, the same input gives the same bytes, and shares make their routes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang, Worker
from graphs import directed_graph
from test_graph import hetero

from partpar import GraphData
from partpar.errors import (
    GraphError,
    PartitionError,
    PartitionExistsError,
)
from partpar.partition import partition_graph, read_manifest, write
from partpar.partition.digest import file_digest

ALGORITHMS = ("metis", "multi-constraint-metis", "ldg", "random")
pytestmark = pytest.mark.usefixtures("fresh_stamps")


def check_tiling(graph: GraphData, root: Path, num_parts: int, algorithm: str) -> None:
    r"""Every node is owned once, every edge stands once, with its destination and with its own attributes."""
    for node_type in graph.node_types:
        owned = []
        for part_id in range(num_parts):
            share = GraphData.load_partition(root, part_id, num_parts, algorithm)
            raw = share.node(node_type)["raw_ids"]
            owned.append(raw)
            low, high = share.offsets(node_type)[part_id : part_id + 2].tolist()
            assert share.node(node_type)["ids"].tolist() == list(range(low, high))
            assert share.num_owned(node_type) == high - low
            for name, value in graph.node(node_type).items():
                assert torch.equal(share.node(node_type)[name], value[raw])
            sources = share.node(node_type, "src")
            assert torch.equal(sources["raw_ids"][: high - low], raw), "owned rows come first"
            halo = sources["ids"][high - low :]
            assert bool((halo.diff() > 0).all()) and not bool(((halo >= low) & (halo < high)).any())
        assert torch.equal(torch.cat(owned).sort().values, torch.arange(graph.num_nodes(node_type)))
    for edge_type in graph.edge_types:
        seen = []
        for part_id in range(num_parts):
            share = GraphData.load_partition(root, part_id, num_parts, algorithm)
            edge_index, raw = share.edge_index(edge_type), share.edge(edge_type)["raw_ids"]
            src = share.node(edge_type[0], "src")["raw_ids"][edge_index[0]]
            dst = share.node(edge_type[2])["raw_ids"][edge_index[1]]
            assert torch.equal(torch.stack([src, dst]), graph.edge_index(edge_type)[:, raw])
            for name, value in graph.edge(edge_type).items():
                assert torch.equal(share.edge(edge_type)[name], value[raw])
            within = edge_index[1].diff() == 0
            assert bool((raw.diff()[within] > 0).all()), "in-edges stand in raw edge order"
            seen.append(raw)
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(graph.num_edges(edge_type)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_parts", [1, 3, 70])
def test_shares_tile_the_graph(tmp_path: Path, algorithm: str, num_parts: int) -> None:
    data = directed_graph()
    data.note, data.basis = "kept", torch.eye(2)
    graph = GraphData.from_pyg_data(data)
    folder = graph.partition_graph(tmp_path, num_parts, algorithm=algorithm)
    assert folder == tmp_path / f"{algorithm}_{num_parts}"
    check_tiling(graph, tmp_path, num_parts, algorithm)
    share = GraphData.load_partition(tmp_path, num_parts - 1, num_parts, algorithm)
    assert share.meta()["note"] == "kept" and torch.equal(share.meta()["basis"], torch.eye(2))
    report = read_manifest(folder).report
    manual = recount(graph, tmp_path, num_parts, algorithm)
    assert report["edge_cut"] == pytest.approx(manual["cut"] / graph.num_edges())
    assert (
        report["communication_volume"]
        == manual["volume"]
        == sum(map(sum, report["nodes"]["node"]["traffic"]))
    )
    assert report["replication_factor"] == pytest.approx((60 + manual["volume"]) / 60)
    assert report["balance"]["#nodes"] == pytest.approx(manual["largest"] * num_parts / 60)


def recount(graph: GraphData, root: Path, num_parts: int, algorithm: str) -> dict[str, int]:
    r"""The report's figures from their definitions, one edge at a time."""
    owner = {}
    for part_id in range(num_parts):
        share = GraphData.load_partition(root, part_id, num_parts, algorithm)
        owner.update(dict.fromkeys(share.node()["raw_ids"].tolist(), part_id))
    pairs = graph.edge_index().T.tolist()
    halo = {(owner[d], s) for s, d in pairs if owner[s] != owner[d]}
    sizes = [list(owner.values()).count(p) for p in range(num_parts)]
    return {"cut": sum(owner[s] != owner[d] for s, d in pairs), "volume": len(halo), "largest": max(sizes)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_typed_shares_tile_the_graph(tmp_path: Path, algorithm: str) -> None:
    graph = GraphData.from_pyg_data(hetero())
    graph.partition_graph(tmp_path, 2, algorithm=algorithm, node_weight="#nodes")
    check_tiling(graph, tmp_path, 2, algorithm)


def test_given_assignment_with_an_empty_part(tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    parts = torch.arange(60) % 2 * 2  # nothing for part 1
    graph.partition_graph(tmp_path, 3, algorithm="given", partition_kwargs={"assignment": parts})
    check_tiling(graph, tmp_path, 3, "given")
    assert GraphData.load_partition(tmp_path, 1, 3, "given").num_owned() == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_input_same_bytes(tmp_path: Path, algorithm: str) -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    for root in ("a", "b"):
        graph.partition_graph(tmp_path / root, 3, algorithm=algorithm, partition_kwargs={"seed": 4})
    for file in sorted((tmp_path / "a" / f"{algorithm}_3").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / f"{algorithm}_3" / file.name).read_bytes(), file.name
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [f"{algorithm}_3"], (
        "a temporary folder is left"
    )


def test_weights(tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(directed_graph(num_nodes=200, num_edges=900))
    for weights in ("train_mask", ["#nodes", "train_mask"], ["#nodes", "#in_edges"]):
        folder = graph.partition_graph(
            tmp_path, 2, weights, "edge_weight", "multi-constraint-metis", overwrite=True
        )
        balance = read_manifest(folder).report["balance"]
        for name in [weights] if isinstance(weights, str) else weights:
            assert balance[name] <= 1.1, (weights, balance)
    for kwargs, message in (
        (
            {"node_weight": "nope"},
            r"node_weight: expected '#nodes', '#in_edges' or a node attribute .*found 'nope'",
        ),
        ({"edge_weight": "nope"}, r"edge_weight: expected the name of an edge attribute .*found 'nope'"),
        (
            {"node_weight": "x"},
            r"node_weight 'x': expected one number a row, found torch.float64 of shape \(200, 8\)",
        ),
        ({"edge_weight": "edge_attr"}, "edge_weight 'edge_attr': expected one number a row"),
        ({"algorithm": "scissors"}, "Unknown partitioning algorithm 'scissors'"),
        ({"partition_kwargs": {"sharp": 1}}, "'sharp'"),
        ({"partition_kwargs": {"seed": "a"}}, "seed: expected an integer, found 'a'"),
        ({"num_parts": 0}, "num_parts: expected an integer of at least 1, found 0"),
        ({"num_parts": 2.0}, "num_parts: expected an integer of at least 1, found 2.0"),
        ({"algorithm": "given"}, "expected partition_kwargs"),
        ({"algorithm": "given", "partition_kwargs": {"assignment": [0]}}, "expected 200 integers"),
        (
            {"algorithm": "given", "partition_kwargs": {"assignment": [2] * 200}},
            "expected parts 0 to 1, found 2 to 2",
        ),
    ):
        with pytest.raises(PartitionError, match=message):
            graph.partition_graph(**{"root": tmp_path / "bad", "num_parts": 2, **kwargs})  # type: ignore[arg-type]
    assert not (tmp_path / "bad").exists()


def test_alias_shares_the_folder(tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    assert graph.partition_graph(tmp_path, 2, algorithm="lgd").name == "ldg_2"
    assert GraphData.load_partition(tmp_path, 0, 2, "lgd").num_parts == 2


def test_bad_graph_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = directed_graph()
    data.edge_index[0, 7] = 60
    with pytest.raises(GraphError, match="found 1 outside, the first at position 7: 60"):
        GraphData.from_pyg_data(data).partition_graph(tmp_path / "p", 2)
    data = directed_graph()
    data.raw_ids = torch.arange(60)
    with pytest.raises(GraphError, match="attribute 'raw_ids' of nodes: shares use this name themselves"):
        GraphData.from_pyg_data(data).partition_graph(tmp_path / "p", 2)
    assert not (tmp_path / "p").exists()


def test_existing_partition_is_kept(tmp_path: Path) -> None:
    graph, other = GraphData.from_pyg_data(directed_graph()), GraphData.from_pyg_data(directed_graph(seed=1))
    folder = graph.partition_graph(tmp_path, 2)
    before = file_digest(folder / "000.safetensors"), (folder / "000.safetensors").stat().st_ino
    graph.partition_graph(tmp_path, 2)
    assert before == (file_digest(folder / "000.safetensors"), (folder / "000.safetensors").stat().st_ino)
    with pytest.raises(PartitionExistsError, match="from another graph; pass overwrite=True"):
        other.partition_graph(tmp_path, 2)
    with pytest.raises(PartitionExistsError, match=r"options {} instead of {'seed': 3}"):
        graph.partition_graph(tmp_path, 2, partition_kwargs={"seed": 3})
    assert before[0] == file_digest(folder / "000.safetensors")
    graph.partition_graph(tmp_path, 2, node_weight="#nodes", partition_kwargs={"seed": 0})  # which are the defaults
    other.partition_graph(tmp_path, 2, overwrite=True)
    check_tiling(other, tmp_path, 2, "metis")
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["metis_2"]


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    folder = graph.partition_graph(tmp_path, 2)
    kept = file_digest(folder / "001.safetensors")
    from partpar.partition import write

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "file_digest", full)
    with pytest.raises(OSError, match="No space left"):
        partition_graph(graph, tmp_path, 2, "train_mask", None, "metis", {}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["metis_2"]
    assert file_digest(folder / "001.safetensors") == kept
    assert GraphData.load_partition(tmp_path, 1, 2).num_parts == 2



def test_share_is_shared_and_private(tmp_path: Path) -> None:
    r"""Pages come from the file; what a process writes into its tensors stays its own."""
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 1)
    first, second = (GraphData.load_partition(tmp_path, 0, 1) for _ in range(2))
    before = second.node()["x"].clone()
    first.node()["x"].zero_()
    assert torch.equal(second.node()["x"], before)
    assert torch.equal(GraphData.load_partition(tmp_path, 0, 1, verify=True).node()["x"], before)


def routed(worker: Worker, root: str, num_parts: int) -> None:
    share = GraphData.load_partition(root, worker.rank, num_parts)
    route = share.to_route()
    assert torch.equal(route.raw_ids, share.node("src")["raw_ids"])
    raw = share.node()["raw_ids"]
    assert torch.equal(route.apply(raw), share.node("src")["raw_ids"])
    assert route.order is None and route.num_halo == share.num_halo()


@pytest.mark.core_on(1, 3)
def test_share_makes_its_route(gang: Gang, world_size: int, tmp_path: Path) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, world_size)
    gang.run(routed, world_size, str(tmp_path), world_size)


def test_route_of_another_world_size_raises_everywhere(gang: Gang, tmp_path: Path) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 3)
    for error in gang.run_expecting_errors(routed, 2, str(tmp_path), 3):
        assert (
            error is not None and "expected as many ranks as the partition has parts (3), found 2" in error[1]
        )


def test_partition_whose_manifest_tells_defaults_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, other = (GraphData.from_pyg_data(directed_graph(seed)) for seed in (0, 1))
    told = {"node_weight": "#nodes", "partition_kwargs": {"seed": 0}}
    with monkeypatch.context() as older:
        older.setattr(write, "_defaults_omitted", lambda algorithm, weights, options: (weights, options))
        folder = graph.partition_graph(tmp_path, 2, **told)  # type: ignore[arg-type]
    before = (folder / "manifest.json").read_bytes()
    assert read_manifest(folder).arguments["options"] == {"seed": 0}
    graph.partition_graph(tmp_path, 2)
    graph.partition_graph(tmp_path, 2, **told)  # type: ignore[arg-type]
    with pytest.raises(PartitionExistsError, match="from another graph"):
        other.partition_graph(tmp_path, 2)
    assert before == (folder / "manifest.json").read_bytes()


def forgotten_rank(worker: Worker, root: str, parts: list[int]) -> None:
    GraphData.load_partition(root, parts[worker.rank], len(parts)).to_route()


@pytest.mark.parametrize(
    "parts, found", [([0, 0], "ranks 0 and 1 both with part 0"), ([1, 0], "found part 1 on rank 0")]
)
def test_share_of_another_rank_raises_everywhere(gang: Gang, tmp_path: Path, parts: list[int], found: str) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2)
    for error in gang.run_expecting_errors(forgotten_rank, 2, str(tmp_path), parts):
        assert error is not None and error[0] == "AgreementError"
        assert found in error[1] and "part_id=worker.rank" in error[1]


def mixed_runs(worker: Worker, roots: list[str]) -> None:
    GraphData.load_partition(roots[worker.rank], worker.rank, 2).to_route()


def test_shares_of_two_runs_do_not_mix(gang: Gang, tmp_path: Path) -> None:
    for seed in (0, 1):
        GraphData.from_pyg_data(directed_graph(seed)).partition_graph(tmp_path / str(seed), 2)
    for error in gang.run_expecting_errors(mixed_runs, 2, [str(tmp_path / "0"), str(tmp_path / "1")]):
        assert error is not None and "to_route: ranks disagree on run_id" in error[1]


MEMORY = """
import resource, sys, torch
from partpar import GraphData
graph = GraphData.open(sys.argv[1])
warm = GraphData.from_pyg_data(__import__("torch_geometric").data.Data(edge_index=torch.zeros(2, 4, dtype=torch.int64), num_nodes=2))
warm.partition_graph(sys.argv[2] + "/warm", 2, algorithm="given", partition_kwargs={"assignment": [0, 1]})
def peak():
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")][0] * 1024
before = peak()
parts = torch.arange(graph.num_nodes()) % int(sys.argv[3])
graph.partition_graph(sys.argv[2], int(sys.argv[3]), algorithm="given", partition_kwargs={"assignment": parts})
print(peak() - before)
"""


@pytest.mark.soak
@pytest.mark.parametrize("num_parts", [1, 4])
def test_peak_memory_of_cutting(tmp_path: Path, num_parts: int) -> None:
    r"""At most three times the graph's own, its mapped pages counted."""
    draw = np.random.default_rng(0)
    num_nodes, num_edges = 200_000, 4_000_000
    (tmp_path / "g").mkdir()
    np.save(tmp_path / "g" / "edge_index.npy", draw.integers(num_nodes, size=(2, num_edges)))
    np.save(tmp_path / "g" / "x.npy", np.ones((num_nodes, 64), dtype=np.float32))
    size = sum(f.stat().st_size for f in (tmp_path / "g").iterdir())
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "g"), str(tmp_path), str(num_parts)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) <= 3 * size, f"{int(out.stdout) / size:.2f} times the graph"


def test_wrong_arguments_are_named_where_a_partition_stands(tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    graph.partition_graph(tmp_path, 2)
    with pytest.raises(PartitionError, match="found 'trainmask'"):
        graph.partition_graph(tmp_path, 2, node_weight="trainmask")
    with pytest.raises(PartitionError, match="'sede'"):
        graph.partition_graph(tmp_path, 2, partition_kwargs={"sede": 1})


def test_parts_are_an_integer_and_the_root_is_no_file(tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    with pytest.raises(PartitionError, match=r"num_parts: expected an integer of at least 1, found 2\.0"):
        graph.partition_graph(tmp_path, 2.0)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PartitionError, match=f"root {root}: expected a folder.*found the file {tmp_path / 'file'}"):
            graph.partition_graph(root, 2)
