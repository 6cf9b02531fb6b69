r"""Generated graphs, files of arrays and the errors on the way to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import npz_path
from torch_geometric.data import Data, HeteroData

from partpar import datasets
from partpar.errors import GraphError


def _equal(a: Data, b: Data) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key, _ in a
    )


def test_planted_is_a_clean_undirected_graph_and_the_same_for_a_seed() -> None:
    data = datasets.planted(num_nodes=500, num_classes=5, seed=3)
    data.validate(raise_on_error=True)
    assert data.is_undirected()
    assert not data.has_self_loops()
    assert data.is_coalesced()
    assert data.y.bincount().tolist() == [100] * 5
    assert int(data.train_mask.sum() + data.val_mask.sum() + data.test_mask.sum()) == 500
    assert not (data.train_mask & data.val_mask).any()
    assert _equal(data, datasets.planted(num_nodes=500, num_classes=5, seed=3))
    assert not _equal(data, datasets.planted(num_nodes=500, num_classes=5, seed=4))


def test_planted_mixes_communities_as_told_and_has_a_heavy_tail() -> None:
    for mixing in (0.0, 0.5):
        data = datasets.planted(num_nodes=5000, num_classes=10, mixing=mixing)
        src, dst = data.edge_index
        within = (data.y[src] == data.y[dst]).double().mean()
        # A tenth of the edges that ignore communities ends in the right one all the same.
        assert within == pytest.approx(1 - 0.9 * mixing, abs=0.03)
    degree = dst.bincount(minlength=5000)
    assert degree.max() > 10 * degree.double().mean()


def test_planted_classes_may_have_several_communities() -> None:
    data = datasets.planted(num_nodes=600, num_classes=3, num_communities=30, mixing=0.0)
    src, dst = data.edge_index
    assert torch.equal(data.y[src], data.y[dst])
    assert data.y.unique().numel() == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_nodes": 3},
        {"num_classes": 0},
        {"num_communities": 2},
        {"mixing": 1.5},
        {"tail": 1.0},
        {"noise": -1.0},
    ],
)
def test_planted_refuses_what_makes_no_graph(wrong: dict) -> None:
    with pytest.raises(GraphError, match="found"):
        datasets.planted(**wrong)


def test_planted_features_alone_say_little() -> None:
    data = datasets.planted()
    centres = torch.stack([data.x[data.y == c].mean(dim=0) for c in range(8)])
    alone = (data.x @ centres.T).argmax(dim=1) == data.y
    around = torch.zeros_like(data.x).index_add_(0, data.edge_index[1], data.x[data.edge_index[0]])
    assert (around @ centres.T).argmax(dim=1).eq(data.y).double().mean() > alone.double().mean() + 0.2


def test_karate_has_both_factions_to_learn_from() -> None:
    data = datasets.karate()
    assert (data.num_nodes, data.num_edges) == (34, 156)
    assert data.is_undirected()
    assert data.y.bincount().tolist() == [17, 17]
    assert data.y[data.train_mask].bincount().tolist() == [4, 4]
    assert int((data.train_mask.int() + data.val_mask.int() + data.test_mask.int()).max()) == 1


def test_npz_reads_every_array(tmp_path: Path) -> None:
    rows, columns = np.array([0, 0, 2]), np.array([1, 3, 0])
    np.savez(
        tmp_path / "g.npz",
        edge_index=np.array([[0, 1], [1, 2]]),
        num_nodes=np.int64(4),
        x_indptr=np.array([0, 2, 2, 3, 3]),
        x_indices=columns,
        x_data=np.array([1.0, 2.0, 3.0], np.float32),
        x_shape=np.array([4, 5]),
        train_mask=np.eye(4, 3, dtype=bool),
        name=np.array(["a", "b", "c", "d"]),
    )
    data = datasets.load(str(tmp_path / "g.npz"), split=2)
    expected = torch.zeros(4, 5)
    expected[rows, columns] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(data.x, expected)
    assert data.num_nodes == 4
    assert data.train_mask.tolist() == [False, False, True, False]
    assert data.name == ["a", "b", "c", "d"]


def test_npz_reads_events_and_types(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "t.npz",
        src=np.array([0, 1, 1]),
        dst=np.array([1, 0, 0]),
        t=np.array([5, 6, 7]),
        num_nodes=2,
    )
    events = datasets.from_npz(tmp_path / "t.npz")
    assert events.edge_index.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert events.is_edge_attr("t")

    np.savez(
        tmp_path / "h.npz",
        edge_index__a__to__b=np.array([[0, 1], [0, 0]]),
        num_nodes__a=2,
        num_nodes__b=1,
        x__a_indptr=np.array([0, 1, 1]),
        x__a_indices=np.array([2]),
        x__a_data=np.array([1.5]),
        x__a_shape=np.array([2, 3]),
    )
    typed = datasets.from_npz(tmp_path / "h.npz")
    assert isinstance(typed, HeteroData)
    assert typed["a"].x.tolist() == [[0, 0, 1.5], [0, 0, 0]]
    assert typed["a", "to", "b"].edge_index.tolist() == [[0, 1], [0, 0]]
    assert typed["b"].num_nodes == 1


def test_npz_errors_name_the_file_and_what_is_wrong(tmp_path: Path) -> None:
    def save(**arrays: object) -> Path:
        np.savez(tmp_path / "bad.npz", **arrays)
        return tmp_path / "bad.npz"

    edges = np.zeros((2, 1), int)
    csr = {"x_indptr": np.array([0, 1]), "x_data": np.ones(1), "x_shape": np.array([1, 2])}
    with pytest.raises(GraphError, match=r"none\.npz: expected an \.npz file"):
        datasets.from_npz(tmp_path / "none.npz")
    with pytest.raises(GraphError, match=r"bad\.npz: expected an array named edge_index"):
        datasets.from_npz(save(x=np.ones(3)))
    with pytest.raises(GraphError, match="expected a split from 0 to 2 of train_mask, found 3"):
        datasets.from_npz(save(edge_index=edges, train_mask=np.zeros((1, 3), bool)), split=3)
    for column in (-1, 2):
        with pytest.raises(GraphError, match="pieces of a 1 x 2 CSR matrix"):
            datasets.from_npz(save(edge_index=edges, **csr, x_indices=np.array([column])))
    with pytest.raises(GraphError, match="plain arrays"):
        datasets.from_npz(save(edge_index=edges, y=np.array([object()], dtype=object)))
    (tmp_path / "bad.npz").write_bytes(b"not an archive")
    with pytest.raises(GraphError, match="plain arrays"):
        datasets.from_npz(tmp_path / "bad.npz")


def test_unknown_or_unreachable_datasets_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GraphError, match="expected a dataset among planted, karate, Cora"):
        datasets.load("nonesuch")
    with pytest.raises(GraphError, match="expected a dataset among .*, ogbn-arxiv, .*found 'ogbn-foo'"):
        datasets.load("ogbn-foo")

    def unreachable(name: str, folder: Path) -> Data:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(datasets, "_planetoid", unreachable)
    with pytest.raises(GraphError, match=r"could not be downloaded \(no route to host\)") as told:
        datasets.load("cora", tmp_path)
    assert told.value.__suppress_context__, "what happened within the download is not shown"
    monkeypatch.setitem(__import__("sys").modules, "ogb.nodeproppred", None)
    with pytest.raises(GraphError, match="pip install ogb"):
        datasets.load("ogbn-arxiv", tmp_path)


def test_real_files_read_as_their_notes_say() -> None:
    cora = datasets.from_npz(npz_path("cora"))
    assert (cora.num_nodes, cora.num_edges, cora.num_features) == (2708, 10556, 1433)
    assert int(cora.x.count_nonzero()) == 49216
    assert [int(cora[f"{part}_mask"].sum()) for part in ("train", "val", "test")] == [140, 500, 1000]
    tolokers = datasets.from_npz(npz_path("tolokers"), split=9)
    assert tolokers.train_mask.shape == (11758,)
    ratings = datasets.from_npz(npz_path("bitcoin_otc"))
    assert ratings.msg.shape == (ratings.num_edges, 1)
