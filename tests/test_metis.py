r"""METIS: the graph it is given, its options, several constraints, and the library behind it."""

import ctypes.util
import warnings
from typing import Any

import numpy as np
import pymetis
import pytest
from graphs import load_npz_graph
from problems import STAR, imbalance, planted, problem, real

from partpar.errors import PartitionError
from partpar.partition import metis, multi_constraint, registry
from partpar.partition.balance import PartitionBalanceWarning, best_possible
from partpar.partition.problem import Array, ArrayEdges
from partpar.partition.symmetrise import SymmetricGraph, symmetrise


def dense(edge_index: Array, num_nodes: int, weight: Any = 1) -> Array:
    matrix = np.zeros((num_nodes, num_nodes))
    np.add.at(matrix, tuple(edge_index), weight)
    matrix += matrix.T
    np.fill_diagonal(matrix, 0)
    return matrix


def as_matrix(graph: SymmetricGraph) -> Array:
    matrix = np.zeros((graph.num_nodes, graph.num_nodes))
    rows = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    matrix[rows, graph.indices] = 1 if graph.weights is None else graph.weights
    assert (np.diff(graph.indices)[np.diff(rows) == 0] > 0).all()
    return matrix


def test_symmetric_copy_counts_edges_and_sums_weights() -> None:
    edge_index = np.concatenate([planted(300, 1500), planted(300, 300)[:, :100]], axis=1)
    np.testing.assert_array_equal(as_matrix(symmetrise(ArrayEdges(edge_index), 300)), dense(edge_index, 300))
    weight = np.random.default_rng(0).integers(1, 9, edge_index.shape[1])
    graph = symmetrise(ArrayEdges(edge_index, weight), 300)
    np.testing.assert_array_equal(as_matrix(graph), dense(edge_index, 300, weight))
    graph = symmetrise(ArrayEdges(edge_index, weight * 0.37), 300)
    expected = dense(edge_index, 300, weight)
    expected *= 1000 / expected[expected > 0].mean()
    np.testing.assert_allclose(as_matrix(graph), expected, atol=0.51)
    assert symmetrise(ArrayEdges(STAR), 100).weights is None


@pytest.mark.parametrize("num_parts", [2, 8, 32])
@pytest.mark.parametrize("name", ["planted", "mesh_4elt"])
def test_cut_is_that_of_pymetis_called_directly(name: str, num_parts: int) -> None:
    p = problem(planted(), 2000, num_parts, seed=7) if name == "planted" else real(name, num_parts)
    graph = symmetrise(p.edges, p.num_nodes)
    direct = pymetis.part_graph(
        num_parts,
        pymetis.CSRAdjacency(graph.indptr, graph.indices),
        eweights=graph.weights,
        options=pymetis.Options(seed=p.seed),
    )
    assignment = registry.assign("metis", p)
    assert graph.cut(assignment) == direct.edge_cuts
    np.testing.assert_array_equal(assignment, direct.vertex_part)


@pytest.mark.parametrize(
    ("options", "settings", "recursive"),
    [
        ({"objective": "volume"}, {"objtype": 1}, False),
        ({"recursive": False, "ufactor": 10}, {"ufactor": 10}, False),
        ({"recursive": True, "niter": 3, "ncuts": 2}, {"niter": 3, "ncuts": 2}, True),
    ],
)
def test_options_reach_metis(
    options: dict[str, Any], settings: dict[str, int], recursive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real_call = pymetis.part_graph

    def spy(num_parts: int, adjacency: Any, **given: Any) -> Any:
        asked.append(given)
        return real_call(num_parts, adjacency, **given)

    monkeypatch.setattr(pymetis, "part_graph", spy)
    registry.assign("metis", problem(planted(), 2000, 4, seed=9), **options)
    assert asked[0]["recursive"] is recursive
    for name, value in {"seed": 9, **settings}.items():
        index = getattr(pymetis._internal.options_indices, name.upper())
        assert asked[0]["options"]._get(index) == value


def test_edge_weights_steer_metis() -> None:
    ring = np.stack([np.arange(16), (np.arange(16) + 1) % 16])
    weight = np.full(16, 10.0)
    weight[[3, 11]] = 0.5
    for algorithm in ("metis", "multi-constraint-metis"):
        assignment = registry.assign(algorithm, problem(ring, 16, 2, edge_weight=weight))
        assert set(np.flatnonzero(assignment[ring[0]] != assignment[ring[1]])) == {3, 11}


def test_float_weights_keep_their_proportions() -> None:
    column = np.array([0.25, 1.5, 0.0, 3.25])
    scaled = metis.integer_weights(column)
    np.testing.assert_allclose(scaled / scaled.sum(), column / column.sum(), atol=1e-8)
    assert metis.integer_weights(np.array([1.0, 0, 7])).tolist() == [1, 0, 7]
    assert metis.integer_weights(np.array([2.0**40, 2.0**40])).sum() == 2**30


def test_multi_constraint_on_a_real_graph() -> None:
    data = load_npz_graph("cora")
    weights = {
        "#nodes": np.ones(data.num_nodes),
        "#in_edges": np.bincount(data.edge_index[1], minlength=data.num_nodes),
    }
    weights |= {name: data[f"{name}_mask"].numpy() for name in ("train", "val", "test")}
    p = problem(data.edge_index.numpy(), data.num_nodes, 4, weights)
    assignment = registry.assign("multi-constraint-metis", p)
    for name, weight in weights.items():
        assert weight.sum() > 0, name
        assert imbalance(weight, assignment, 4) <= 1.05 * best_possible(weight, 4) / (weight.sum() / 4), name


def test_multi_constraint_retries_until_even(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    found = {False: np.zeros(2000, dtype=np.int32), True: (np.arange(2000) % 4).astype(np.int32)}

    def fake(
        library: Any, graph: Any, weights: Any, num_parts: Any, bounds: Any, recursive: Any, options: Any
    ) -> Array:
        calls.append((recursive, options["SEED"], float(bounds[0])))
        return found[recursive]

    monkeypatch.setattr(multi_constraint, "part_graph", fake)
    weights = {"a": np.ones(2000), "b": np.ones(2000)}
    p = problem(planted(), 2000, 4, weights, seed=3)
    np.testing.assert_array_equal(registry.assign("multi-constraint-metis", p), found[True])
    assert calls == [(False, 3, 1.03), (False, 3, 1.01), (False, 4, 1.01), (True, 3, 1.01)]
    calls.clear()
    with pytest.warns(PartitionBalanceWarning, match=r"out of balance.*4\.000 times") as caught:
        registry.assign("multi-constraint-metis", p, recursive=False)
    assert [str(warning.message).split("'")[1] for warning in caught] == ["a", "b"]
    assert [recursive for recursive, _, _ in calls] == [False, False, False]


def test_a_constraint_of_fewer_nodes_than_parts_leaves_no_part_empty() -> None:
    weights = {"#nodes": np.ones(2000), "train": np.arange(2000) < 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartitionBalanceWarning)
        assignment = registry.assign("multi-constraint-metis", problem(planted(), 2000, 4, weights))
    assert imbalance(np.ones(2000), assignment, 4) <= 1.05


def test_metis_is_not_asked_for_what_cannot_be_even(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Array] = []

    def fake(library: Any, graph: Any, weights: Any, num_parts: Any, *rest: Any) -> Array:
        asked.append(weights)
        return (np.arange(2000) % num_parts).astype(np.int32)

    monkeypatch.setattr(multi_constraint, "part_graph", fake)
    weights = {"few": np.arange(2000) < 3, "#nodes": np.ones(2000), "zero": np.zeros(2000)}
    registry.assign("multi-constraint-metis", problem(planted(), 2000, 4, weights))
    np.testing.assert_array_equal(asked[0], np.ones((2000, 1)))


def test_an_empty_part_is_tried_again_even_if_weights_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # One node outweighs all others, which may then stand in one part without being too heavy for it.
    weight = np.ones(2000)
    weight[0] = 10_000
    uneven = np.where(np.arange(2000) == 0, 0, 1).astype(np.int32)
    better = np.where(np.arange(2000) == 0, 0, 1 + np.arange(2000) % 2).astype(np.int32)
    answers = iter([uneven, better])
    monkeypatch.setattr(multi_constraint, "part_graph", lambda *_: next(answers))
    assignment = registry.assign("multi-constraint-metis", problem(planted(), 2000, 3, {"w": weight}))
    np.testing.assert_array_equal(assignment, better)


class _NoSymbols:
    pass


def test_without_the_symbol_the_systems_library_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real_library = ctypes.CDLL
    opened = []

    def open_library(path: Any) -> Any:
        opened.append(path)
        return _NoSymbols() if "pymetis" in str(path) else real_library(None)

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.5")
    library = multi_constraint.find_library()
    assert opened[-1] == "libmetis.so.5"
    assert library.index is np.int32
    assert library.places == {"OBJTYPE": 1}


def test_32_bit_library_refuses_what_it_cannot_count() -> None:
    graph = symmetrise(ArrayEdges(STAR), 100)
    library = multi_constraint.Library(None, np.int32, {})
    with pytest.raises(PartitionError, match="32 bits"):
        multi_constraint.part_graph(library, graph, np.full((100, 1), 2**30), 2, np.array([1.03]), False, {})


def test_without_any_library_one_combined_weight_is_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: _NoSymbols())
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    weights = {"a": np.ones(2000), "b": np.random.default_rng(0).random(2000)}
    with pytest.warns(PartitionBalanceWarning, match="one combined weight"):
        assignment = registry.assign("multi-constraint-metis", problem(planted(), 2000, 4, weights))
    combined = sum(w / w.mean() for w in weights.values())
    assert imbalance(combined, assignment, 4) <= 1.05
