r"""GraphData: what goes in comes out, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from graphs import directed_graph
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from partpar import GraphData
from partpar.errors import GraphError
from partpar.graph import Frame


def hetero() -> HeteroData:
    data = HeteroData(title="papers")
    data["author"].x = torch.randn(5, 3)
    data["paper"].x = torch.randn(7, 2)
    data["paper"].y = torch.arange(7)
    data["empty"].num_nodes = 0
    data["author", "writes", "paper"].edge_index = torch.tensor([[0, 4, 2], [6, 0, 0]])
    data["author", "writes", "paper"].since = torch.tensor([3, 1, 2])
    data["paper", "cites", "paper"].edge_index = torch.tensor([[0, 1], [1, 1]])
    data["paper", "in", "empty"].edge_index = torch.empty(2, 0, dtype=torch.int64)
    return data


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def test_homogeneous_round_trip() -> None:
    data = directed_graph()
    data.name, data.split, data.basis = "odd", [1, 2], torch.eye(2)
    graph = GraphData.from_pyg_data(data)
    assert set(graph.node()) == {"x", "y", "train_mask", "val_mask", "test_mask"}
    assert set(graph.edge()) == {"edge_attr", "edge_weight"} and set(graph.meta()) == {
        "name",
        "split",
        "basis",
    }
    back = graph.to_pyg_data()
    assert isinstance(back, Data) and set(back.keys()) == set(data.keys())
    assert all(same(back[key], data[key]) for key in data.to_dict())
    graph.validate(num_classes=4)


def test_typed_round_trip() -> None:
    data = hetero()
    graph = GraphData.from_pyg_data(data)
    assert graph.node_types == ["author", "paper", "empty"] and graph.num_nodes("empty") == 0
    back = graph.to_pyg_data()
    assert isinstance(back, HeteroData) and back.title == "papers"
    for store, other in zip(data.stores, back.stores, strict=True):
        assert all(same(store[key], other[key]) for key in store.to_dict())
    with pytest.raises(
        GraphError, match=r"expected a node type of \['author', 'paper', 'empty'\], found None"
    ):
        graph.node()
    with pytest.raises(GraphError, match="expected an edge type of"):
        graph.edge_index(("paper", "writes", "author"))
    for leave_out in (graph.node, graph.adj, graph.edge_index):
        with pytest.raises(GraphError, match="found None; this graph has several types: name one of them"):
            leave_out()
    with pytest.raises(GraphError, match=r"node\('dst'\): .* several types.* as in node\('author', 'dst'\)"):
        graph.node("dst")
    assert set(graph.collect("y")) == {"paper"}
    with pytest.raises(GraphError, match=r"collect: expected .*'paper': \['x', 'y'\].* found 'z'"):
        graph.collect("z")


def test_rows_that_fit_nothing_are_told() -> None:
    data = good()
    data.y, data.train_mask, data.basis_index, data.scale = torch.ones(4), torch.arange(5), torch.ones(2, 7), torch.ones(1)
    with pytest.warns(UserWarning, match="^y: ") as told:
        graph = GraphData.from_pyg_data(data)
    assert [str(w.message) for w in told] == [
        "y: 4 rows, neither 3 nodes nor 2 edges; train_mask: 5 rows, neither 3 nodes nor 2 edges; kept in meta()"
    ]
    assert told[0].filename == __file__ and "meta ['y', 'train_mask', " in repr(graph)
    typed = hetero()
    typed["paper"].y = torch.arange(6)
    with pytest.warns(UserWarning, match="^y: 6 rows, not the 7 nodes of type 'paper'; kept in meta") as told:
        GraphData.from_pyg_data(typed)
    assert len(told) == 1 and told[0].filename == __file__


def test_nothing_is_told_of_a_sound_graph(recwarn: pytest.WarningsRecorder) -> None:
    for data in (directed_graph(), hetero()):
        GraphData.from_pyg_data(data)
    assert not recwarn.list


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_advice_for_an_adjacency_runs(layout: torch.layout) -> None:
    data, edge_index = good(), good().edge_index
    del data.edge_index
    data.adj_t = torch.sparse_coo_tensor(edge_index.flip(0), torch.ones(2), (3, 3)).to_sparse(layout=layout)
    with pytest.raises(GraphError, match="where there is an adj_t: ") as error:
        GraphData.from_pyg_data(data)
    exec(str(error.value).partition("adj_t: ")[2], {"data": data})
    found = GraphData.from_pyg_data(data).edge_index()
    assert set(map(tuple, found.T.tolist())) == set(map(tuple, edge_index.T.tolist()))


def test_as_many_nodes_as_edges() -> None:
    data = Data(
        x=torch.ones(3, 1),
        edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]),
        edge_w=torch.ones(3),
        y=torch.ones(3),
    )
    graph = GraphData.from_pyg_data(data)
    assert set(graph.node()) == {"x", "y"} and set(graph.edge()) == {"edge_w"}


def test_networkx() -> None:
    graph = GraphData.from_networkx(nx.karate_club_graph())
    assert graph.num_nodes() == 34 and graph.num_edges() == 156
    assert graph.edge()["weight"].shape == (156,) and len(graph.meta()["club"]) == 34
    assert GraphData.from_networkx(nx.empty_graph(3)).num_nodes() == 3


def test_folder(tmp_path: Path) -> None:
    for number, data in enumerate((directed_graph(), hetero())):
        graph = GraphData.from_pyg_data(data)
        graph.save(tmp_path / str(number))
        opened = GraphData.open(tmp_path / str(number))
        assert opened.node_types == sorted(graph.node_types) or len(graph.node_types) == 1
        for node_type in graph.node_types:
            assert opened.num_nodes(node_type) == graph.num_nodes(node_type)
            assert all(same(opened.node(node_type)[k], v) for k, v in graph.node(node_type).items())
        for edge_type in graph.edge_types:
            assert torch.equal(opened.edge_index(edge_type), graph.edge_index(edge_type))
            assert all(same(opened.edge(edge_type)[k], v) for k, v in graph.edge(edge_type).items())
    (tmp_path / "none").mkdir()
    with pytest.raises(GraphError, match="expected a folder of .npy files"):
        GraphData.open(tmp_path / "none")
    (tmp_path / "none" / "x.npy").write_bytes(b"not an array")
    with pytest.raises(GraphError, match="expected a .npy file of numbers"):
        GraphData.open(tmp_path / "none")
    np.save(tmp_path / "none" / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(GraphError, match="x.npy"):
        GraphData.open(tmp_path / "none")


def test_opened_arrays_are_not_written_back(tmp_path: Path) -> None:
    np.save(tmp_path / "edge_index.npy", np.array([[0, 1], [1, 0]]))
    np.save(tmp_path / "x.npy", np.zeros((2, 1)))
    GraphData.open(tmp_path).node()["x"][0] = 5
    assert GraphData.open(tmp_path).node()["x"][0] == 0


def test_bipartite_puts_destinations_first() -> None:
    dst_ids, src_ids = (
        torch.tensor([40, 10]),
        torch.tensor([30, 10, 20]),
    )  # 40 is no source, 10 stands in between
    edge_index = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 1]])
    share = GraphData.from_bipartite(edge_index, 3, 2, src_ids, dst_ids)
    ordered = share.node("src")["raw_ids"]
    assert ordered.tolist() == [40, 10, 20, 30]
    assert ordered[share.edge_index()[0]].tolist() == src_ids[edge_index[0]].tolist()
    assert torch.equal(share.edge_index()[1], edge_index[1])
    assert share.node("src")["input_rows"].tolist() == [-1, 1, 2, 0]
    kept = GraphData.from_bipartite(edge_index, raw_src_ids=torch.tensor([40, 10, 9]), raw_dst_ids=dst_ids)
    assert kept.node("src")["raw_ids"].tolist() == [40, 10, 9]
    for bad, message in (
        ({"raw_dst_ids": torch.tensor([1, 1])}, "expected 2 distinct ids, found 1"),
        ({"num_src_nodes": 2}, "expected src indices from 0 to 1, found 0 to 2"),
        ({"raw_src_ids": torch.tensor([1.0, 2, 3])}, "expected int64"),
    ):
        with pytest.raises(GraphError, match=message):
            GraphData.from_bipartite(edge_index, **bad)  # type: ignore[arg-type]


def good() -> Data:
    return Data(
        x=torch.ones(3, 1),
        y=torch.tensor([0, -1, 1]),
        edge_index=torch.tensor([[0, 1], [1, 2]]),
        edge_attr=torch.ones(2, 1),
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("edge_index", torch.tensor([[0, 3], [1, 4]]), r"source indices: expected 0 to 2, found 1 outside, the first at position 1: 3"),
        ("edge_index", torch.tensor([[0, 1], [-1, -2]]), r"destination indices: expected 0 to 2, found 2 outside, the first at position 0: -1"),
        ("x", torch.tensor([[0.0], [float("nan")], [float("inf")]]), r"'x' of nodes: expected finite numbers, found 2 .* first at \[1, 0\]"),
        ("edge_attr", torch.tensor([[0.0], [float("nan")]]), r"'edge_attr' of edges: expected finite numbers, found 1"),
        ("y", torch.tensor([0, -2, 1]), r"labels 'y' of nodes: expected -1 to 1, found 1 outside, the first at position 1: -2"),
        ("y", torch.tensor([0.0, 1, 1]), r"labels 'y' of nodes: expected one integer a node .* torch.float32 of shape \(3,\); use y.long\(\)"),
        ("y", torch.tensor([[0], [1], [1]]), r"found torch.int64 of shape \(3, 1\); use y.squeeze\(1\)$"),
        ("y", torch.tensor([0, 2, 5]), r"expected -1 to 1, found 2 outside, the first at position 1: 2"),
    ],
)  # fmt: skip
def test_validate_names_the_first_offender(key: str, value: Tensor, message: str) -> None:
    GraphData.from_pyg_data(good()).validate(num_classes=2)
    data = good()
    data[key] = value
    graph = GraphData.from_pyg_data(data)
    with pytest.raises(GraphError, match=message):
        graph.validate(num_classes=2)
    if "finite" in message:
        graph.validate(allow_nan=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "edge_index",
            torch.tensor([[0.0], [1.0]]),
            "expected edge_index of dtype torch.int64, found torch.float32",
        ),
        ("edge_index", torch.tensor([0, 1, 2]), r"shape \[2, E\], found \(3,\)"),
        ("edge_index", None, "expected edge_index, found none"),
        ("model", torch.nn.Linear(1, 1), "attribute 'model': expected .* found Linear; remove or convert it"),
        (
            "adj",
            torch.eye(3).to_sparse(),
            "attribute 'adj': expected a dense tensor, found layout torch.sparse_coo",
        ),
        ("pieces", [torch.ones(1)], "found tensors inside a list"),
    ],
)
def test_constructor_names_what_it_cannot_take(key: str, value: Any, message: str) -> None:
    data = good()
    data[key] = value
    with pytest.raises(GraphError, match=message):
        GraphData.from_pyg_data(data)


def test_constructor_wants_a_graph() -> None:
    with pytest.raises(GraphError, match="expected a torch_geometric Data or HeteroData, found dict"):
        GraphData.from_pyg_data({})  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="set data.num_nodes"):
        GraphData.from_pyg_data(Data())
    data = HeteroData()
    data["src"].x = torch.ones(1, 1)
    data["a"].x = torch.ones(1, 1)
    with pytest.raises(GraphError, match="expected node types other than 'dst' and 'src'"):
        GraphData.from_pyg_data(data)


def test_frame_checks_rows_and_reads_late() -> None:
    reads = []

    def read() -> Tensor:
        reads.append(1)
        return torch.ones(3)

    frame = Frame(3, {"x": torch.zeros(3, 2), "late": read}, "nodes")
    assert "late" in frame and list(frame) == ["x", "late"] and len(frame) == 2 and not reads
    assert (
        torch.equal(frame["late"], torch.ones(3))
        and torch.equal(frame["late"], torch.ones(3))
        and len(reads) == 1
    )
    with pytest.raises(GraphError, match=r"attribute 'y' of nodes: expected 3 rows, found shape \(2,\)"):
        frame["y"] = torch.zeros(2)
    with pytest.raises(GraphError, match="expected a tensor, found int"):
        frame["y"] = 3  # type: ignore[assignment]
    with pytest.raises(KeyError, match=r"nodes: expected one of \['late', 'x'\], found 'z'"):
        frame["z"]
    del frame["x"]
    assert list(frame.to("cpu")) == ["late"]


def test_whole_graph_is_its_own_part() -> None:
    graph = GraphData.from_pyg_data(good())
    assert graph.part is None and graph.part_id == 0 and graph.num_parts == 1 and graph.num_halo() == 0
    assert graph.offsets().tolist() == [0, 3] and graph.node("src") is graph.node("dst")
    route = graph.to_route()
    assert torch.equal(route.apply(torch.arange(3.0)), torch.arange(3.0))
    indptr, indices = graph.csc()
    assert indptr.tolist() == [0, 0, 1, 2] and indices.tolist() == [0, 1]
    assert graph.to("cpu").node()["x"].shape == (3, 1) and "GraphData[node: 3 nodes" in repr(graph)
    with pytest.raises(GraphError, match="expected side"):
        graph.node(side="left")
