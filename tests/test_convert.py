r"""Partitions that others wrote give the same graph and the same cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import directed_graph
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.distributed import Partitioner
from torch_geometric.loader.cluster import ClusterData

from partpar import GraphData
from partpar.cli.main import main
from partpar.errors import PartitionFileError
from partpar.partition.assemble import assemble
from partpar.partition.dgl_json import read_dgl_assignment
from partpar.partition.pyg_files import read_pyg_partition
from partpar.partition.verify import verify_partition

PARTS = 3


@pytest.fixture(autouse=True)
def _assign(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""PyG's METIS needs a compiled extension; all else of its Partitioner runs as it is."""

    def parts(self: ClusterData, edge_index: Tensor, num_nodes: int) -> Tensor:
        return torch.randint(self.num_parts, (num_nodes,), generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(ClusterData, "_metis", parts)


def _typed() -> HeteroData:
    draw = torch.Generator().manual_seed(0)
    data = HeteroData()
    data["author"].x, data["paper"].x = torch.randn(20, 4, generator=draw), torch.randn(30, 4, generator=draw)
    for name, count in ((("author", "writes", "paper"), 70), (("paper", "cites", "paper"), 90), (("paper", "by", "author"), 40)):
        ends = [torch.randint(data[t].num_nodes, (count,), generator=draw) for t in (name[0], name[2])]
        data[name].edge_index = torch.stack(ends)
        data[name].edge_attr = torch.randn(count, 2, generator=draw)
    return data


@pytest.mark.parametrize("time", [None, "node", "edge"])
def test_a_partition_of_pyg_gives_the_same_graph(time: str | None, tmp_path: Path) -> None:
    data = directed_graph()
    kept = Data(x=data.x, edge_index=data.edge_index, edge_attr=data.edge_attr)
    if time is not None:
        kept.time = torch.arange(data.num_nodes if time == "node" else data.num_edges).flip(0)
    Partitioner(kept, PARTS, str(tmp_path / "pyg")).generate_partition()
    assert main(["convert", str(tmp_path / "pyg"), str(tmp_path / "ours"), "--from", "pyg"]) == 0
    folder = tmp_path / "ours" / f"given_{PARTS}"
    assert verify_partition(folder).whole
    again = assemble(folder)
    assert again.edge_index().equal(kept.edge_index)
    assert again.node()["x"].equal(kept.x)
    assert again.edge()["edge_attr"].equal(kept.edge_attr)
    if time is not None:
        assert (again.node()["time"] if time == "node" else again.edge()["edge_time"]).equal(kept.time)
    parts = torch.load(tmp_path / "pyg" / "node_map.pt", weights_only=True)
    for part in range(PARTS):
        share = GraphData.load_partition(tmp_path / "ours", part, PARTS, "given")
        assert share.node()["raw_ids"].equal((parts == part).nonzero().flatten())


def test_a_typed_partition_of_pyg_gives_the_same_graph(tmp_path: Path) -> None:
    data = _typed()
    Partitioner(data, PARTS, str(tmp_path / "pyg")).generate_partition()
    graph, num_parts, assignment = read_pyg_partition(tmp_path / "pyg")
    assert num_parts == PARTS
    folder = graph.partition_graph(tmp_path, PARTS, algorithm="given", partition_kwargs={"assignment": assignment})
    again = assemble(folder)
    assert again.edge_types == data.edge_types
    for name in data.edge_types:
        assert again.edge_index(name).equal(data[name].edge_index)
        assert again.edge(name)["edge_attr"].equal(data[name].edge_attr)
    assert all(again.node(t)["x"].equal(data[t].x) for t in data.node_types)


def test_labels_come_from_the_graph_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = directed_graph()
    Partitioner(Data(x=data.x, edge_index=data.edge_index), 2, str(tmp_path / "pyg")).generate_partition()
    torch.save(data, tmp_path / "g.pt")
    words = ["convert", str(tmp_path / "pyg"), str(tmp_path), "--from", "pyg", "--pt"]
    assert main([*words, str(tmp_path / "g.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_parts"] == 2
    assert assemble(tmp_path / "given_2").node()["y"].equal(data.y)
    torch.save(directed_graph(seed=1), tmp_path / "other.pt")
    assert main([*words, str(tmp_path / "other.pt"), "--overwrite"]) == 1
    assert "found other edges" in capsys.readouterr().err


class _Sly:
    def __reduce__(self) -> tuple:
        return (print, ("run by a file",))


def test_a_foreign_partition_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = directed_graph()
    root = tmp_path / "pyg"
    Partitioner(Data(x=data.x, edge_index=data.edge_index), 2, str(root)).generate_partition()
    for name in ("node_map.pt", "part_1/graph.pt", "part_0/node_feats.pt", "part_0/edge_feats.pt"):
        whole = (root / name).read_bytes()
        torch.save({"x": _Sly()}, root / name)
        with pytest.raises(PartitionFileError, match="expected tensors and plain values"):
            read_pyg_partition(root)
        torch.save({"row": 1}, root / name)
        if "edge_feats" not in name:
            with pytest.raises((PartitionFileError, KeyError)):
                read_pyg_partition(root)
        (root / name).write_bytes(whole)
    assert "run by a file" not in capsys.readouterr().out
    graph = torch.load(root / "part_0" / "graph.pt", weights_only=True)
    graph["edge_id"][0] = graph["edge_id"][1]
    torch.save(graph, root / "part_0" / "graph.pt")
    with pytest.raises(PartitionFileError, match="each edge of"):
        read_pyg_partition(root)
    (root / "META.json").unlink()
    with pytest.raises(PartitionFileError, match="expected the file that PyG's Partitioner writes"):
        read_pyg_partition(root)


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_ranges_of_dgl_and_a_mapping_give_its_cut(suffix: str, tmp_path: Path) -> None:
    data = directed_graph()
    parts = torch.randint(2, (60,), generator=torch.Generator().manual_seed(2))
    order = parts.argsort(stable=True)
    size = int((parts == 0).sum())
    config = {"graph_name": "g", "num_parts": 2, "node_map": {"_N": [[0, size], [size, 60]]}}
    (tmp_path / "g.json").write_text(json.dumps(config))
    torch.save(data, tmp_path / "g.pt")
    mapping = tmp_path / f"mapping.{suffix}"
    if suffix == "npy":
        np.save(mapping, order.numpy())
    else:
        torch.save(order, mapping)
    words = ["--from", "dgl-json", "--pt", str(tmp_path / "g.pt"), "--mapping", str(mapping)]
    assert main(["convert", str(tmp_path / "g.json"), str(tmp_path), *words]) == 0
    share = GraphData.load_partition(tmp_path, 0, 2, "given")
    assert share.node()["raw_ids"].equal((parts == 0).nonzero().flatten())


def test_typed_ranges_of_dgl_lie_among_all_ids(tmp_path: Path) -> None:
    ranges = {"a": [[0, 2], [5, 8]], "b": [[2, 5], [8, 9]]}
    (tmp_path / "g.json").write_text(json.dumps({"num_parts": 2, "node_map": ranges}))
    np.savez(tmp_path / "m.npz", a=np.array([4, 0, 1, 2, 3]), b=np.arange(4))
    num_parts, found = read_dgl_assignment(tmp_path / "g.json", tmp_path / "m.npz")
    assert num_parts == 2
    assert {t: p.tolist() for t, p in found.items()} == {"a": [0, 1, 1, 1, 0], "b": [0, 0, 0, 1]}


@pytest.mark.parametrize(
    ("config", "mapping", "message"),
    [
        ("{}", None, "expected num_parts and node_map"),
        ("[1]", None, "expected a JSON object"),
        ("no", None, "expected JSON"),
        ('{"num_parts": 2, "node_map": {"_N": [[0, 3]]}}', None, "expected 2 ranges"),
        ('{"num_parts": 1, "node_map": {"_N": [[0, 3]]}}', b"DGL's own", "files of DGL's own need DGL once"),
    ],
)
def test_what_cannot_be_read_is_named(config: str, mapping: bytes | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(config)
    if mapping is not None:
        (tmp_path / "m.dgl").write_bytes(mapping)
    with pytest.raises(PartitionFileError, match=message):
        read_dgl_assignment(tmp_path / "g.json", None if mapping is None else tmp_path / "m.dgl")
