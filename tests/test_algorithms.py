r"""The partitioning algorithms on plain arrays: valid, even, the same for the same seed, and good."""

import ctypes.util
import itertools
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pymetis
import pytest
from graphs import load_npz_graph

from partpar.errors import PartitionError
from partpar.partition import blocks, metis, multi_constraint, registry
from partpar.partition.balance import PartitionBalanceWarning, best_possible, check_balance
from partpar.partition.problem import Array, ArrayEdges, JoinedEdges, Problem
from partpar.partition.random import deal
from partpar.partition.symmetrise import SymmetricGraph, symmetrise

ALGORITHMS = ["ldg", "metis", "multi-constraint-metis", "random"]
MESHES = ["mesh_4elt", "mesh_wing", "mesh_fe_4elt2"]


def planted(num_nodes: int = 2000, num_edges: int = 12000, num_groups: int = 8, seed: int = 0) -> Array:
    r"""Directed communities over shuffled ids, with self-loops, duplicates, and 50 isolated nodes."""
    generator = np.random.default_rng(seed)
    ids = generator.permutation(num_nodes)[50:]
    src = generator.integers(0, ids.size, num_edges)
    inside = generator.random(num_edges) < 0.9
    jump = generator.integers(0, ids.size // num_groups, num_edges) * num_groups
    dst = np.where(
        inside,
        (src + jump) % (ids.size // num_groups * num_groups),
        generator.integers(0, ids.size, num_edges),
    )
    edge_index = ids[np.stack([src, dst])]
    edge_index[:, :20] = edge_index[:, 20:40]
    edge_index[1, 40:60] = edge_index[0, 40:60]
    return edge_index


def problem(
    edge_index: Array,
    num_nodes: int,
    num_parts: int,
    weights: dict[str, Array] | None = None,
    seed: int = 0,
    edge_weight: Array | None = None,
) -> Problem:
    return Problem(num_nodes, ArrayEdges(np.asarray(edge_index), edge_weight), num_parts, weights or {}, seed)


def real(name: str, num_parts: int) -> Problem:
    data = load_npz_graph(name)
    return problem(data.edge_index.numpy(), data.num_nodes, num_parts)


def cut_share(p: Problem, assignment: Array) -> float:
    crossing = sum(int((assignment[src] != assignment[dst]).sum()) for src, dst, _ in p.edges.chunks())
    return crossing / p.edges.num_edges


def imbalance(weight: Array, assignment: Array, num_parts: int) -> float:
    loads = np.bincount(assignment, weights=weight, minlength=num_parts)
    return loads.max() / loads.mean()


NO_EDGES = np.zeros((2, 0), dtype=np.int64)
STAR = np.stack([np.zeros(99, dtype=np.int64), np.arange(1, 100)])
HARD_GRAPHS = {
    "no nodes": (NO_EDGES, 0),
    "one node": (NO_EDGES, 1),
    "no edges": (NO_EDGES, 37),
    "only self-loops": (np.tile(np.arange(20), (2, 1)), 20),
    "one edge many times": (np.tile([[3], [4]], 50), 30),
    "star": (STAR, 100),
    "two cliques": (
        np.array([(a, b) for a, b in itertools.product(range(20), range(20)) if a // 10 == b // 10]).T,
        20,
    ),
    "path and isolated nodes": (np.stack([np.arange(29), np.arange(1, 30)]), 60),
}


@pytest.mark.filterwarnings("ignore::partpar.partition.balance.PartitionBalanceWarning")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 150])
@pytest.mark.parametrize("name", HARD_GRAPHS)
def test_hard_graphs_get_valid_and_repeatable_parts(algorithm: str, num_parts: int, name: str) -> None:
    edge_index, num_nodes = HARD_GRAPHS[name]
    generator = np.random.default_rng(1)
    for weights in (
        {},
        {"zero": np.zeros(num_nodes)},
        {
            "few": np.arange(num_nodes) < 2,
            "float": generator.random(num_nodes),
            "zero": np.zeros(num_nodes, int),
        },
    ):
        p = problem(edge_index, num_nodes, num_parts, weights)
        assignment = registry.assign(algorithm, p)
        assert assignment.dtype == np.int32
        assert assignment.shape == (num_nodes,)
        assert np.isin(assignment, np.arange(num_parts)).all()
        np.testing.assert_array_equal(assignment, registry.assign(algorithm, p))
        if num_parts > num_nodes > 0 and not weights:
            assert np.bincount(assignment).max() == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_planted_communities_come_out_even_and_repeatable(algorithm: str) -> None:
    p = problem(planted(), 2000, 8, seed=5)
    assignment = registry.assign(algorithm, p)
    assert imbalance(np.ones(2000), assignment, 8) <= 1.05
    np.testing.assert_array_equal(assignment, registry.assign(algorithm, p))
    limit = {"random": 0.9, "ldg": 0.45, "metis": 0.2, "multi-constraint-metis": 0.2}[algorithm]
    assert cut_share(p, assignment) < limit


@pytest.mark.parametrize(
    ("algorithm", "options"), [("random", {}), ("ldg", {"order": "random"}), ("metis", {})]
)
def test_another_seed_gives_other_parts(algorithm: str, options: dict[str, Any]) -> None:
    first, second = (
        registry.assign(algorithm, problem(planted(), 2000, 4, seed=s), **options) for s in (1, 2)
    )
    assert (first != second).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_weight_comes_out_even(algorithm: str) -> None:
    for weight in (np.random.default_rng(2).random(2000), np.arange(2000) % 5 == 0, np.arange(2000) % 7):
        with warnings.catch_warnings():
            warnings.simplefilter("error", PartitionBalanceWarning)
            assignment = registry.assign(algorithm, problem(planted(), 2000, 4, {"w": weight}))
        assert imbalance(weight, assignment, 4) <= 1.05


@pytest.mark.parametrize("algorithm", ["ldg", "metis", "multi-constraint-metis"])
def test_several_weights_come_out_even(algorithm: str) -> None:
    edge_index = planted()
    weights = {
        "#nodes": np.ones(2000),
        "#in_edges": np.bincount(edge_index[1], minlength=2000),
        "train": np.random.default_rng(3).random(2000) < 0.2,
    }
    assignment = registry.assign(algorithm, problem(edge_index, 2000, 4, weights))
    for name, weight in weights.items():
        assert imbalance(weight, assignment, 4) <= 1.05, name


def test_ldg_bounds_the_number_of_nodes_that_weigh_nothing() -> None:
    weight = np.arange(2000) < 40
    assignment = registry.assign("ldg", problem(planted(), 2000, 4, {"train": weight}))
    assert imbalance(weight, assignment, 4) <= 1.05
    assert imbalance(np.ones(2000), assignment, 4) <= 1.5


def test_ldg_finds_room_for_heavy_nodes() -> None:
    weight = np.ones(2000)
    weight[[1700, 1800, 1900, 1999]] = 400
    assignment = registry.assign("ldg", problem(planted(), 2000, 4, {"w": weight}), order="natural")
    assert imbalance(weight, assignment, 4) <= 1.031
    assert np.unique(assignment[weight > 1]).size == 4


@pytest.mark.parametrize("num_parts", [2, 8, 32])
@pytest.mark.parametrize("name", MESHES)
def test_ldg_cuts_at_most_half_of_random(name: str, num_parts: int) -> None:
    p = real(name, num_parts)
    assignment = registry.assign("lgd", p)
    assert imbalance(np.ones(p.num_nodes), assignment, num_parts) <= 1.05
    assert cut_share(p, assignment) <= 0.5 * cut_share(p, registry.assign("random", p))


def test_more_passes_of_ldg_cut_less() -> None:
    p = problem(planted(), 2000, 4)
    once, often = (cut_share(p, registry.assign("ldg", p, passes=passes)) for passes in (1, 5))
    assert often < once


def test_one_pass_of_ldg_is_the_greedy_rule() -> None:
    edge_index, num_nodes, num_parts = planted(300, 1500), 300, 3
    capacity = max(1.03 * num_nodes / num_parts, num_nodes // num_parts)
    parts, loads = np.full(num_nodes, -1), np.zeros(num_parts)
    for node in range(num_nodes):
        around = np.concatenate([edge_index[1, edge_index[0] == node], edge_index[0, edge_index[1] == node]])
        near = np.bincount(parts[around[(around != node) & (parts[around] >= 0)]], minlength=num_parts)
        score = np.where(loads + 1 <= capacity, near * (1 - loads / capacity), 0)
        parts[node] = score.argmax() if score.any() else loads.argmin()
        loads[parts[node]] += 1
    found = registry.assign("ldg", problem(edge_index, num_nodes, num_parts), passes=1, order="natural")
    np.testing.assert_array_equal(found, parts)


@pytest.mark.parametrize("order", ["bfs", "natural", "random"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ldg_from_disk_equals_ldg_in_memory(order: str, weighted: bool) -> None:
    edge_index = planted()
    edge_weight = (
        np.random.default_rng(4).random(edge_index.shape[1]) * (edge_index[0] % 3) if weighted else None
    )
    p = problem(edge_index, 2000, 8, seed=3, edge_weight=edge_weight)
    in_memory = registry.assign("ldg", p, order=order)
    np.testing.assert_array_equal(in_memory, registry.assign("ldg", p, order=order, memory_bytes=5000))


def test_blocks_on_disk_hold_the_rows_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    edges, rank = ArrayEdges(planted()), np.random.default_rng(0).permutation(2000)
    with blocks.Blocks(edges, 2000, rank, 2**30) as whole, blocks.Blocks(edges, 2000, rank, 4096) as pieces:
        assert (whole.on_disk, pieces.on_disk) == (False, True)
        assert len(list(tmp_path.iterdir())) == 1
        found = list(pieces)
        assert len(found) > 20
        assert max(block.neighbours.nbytes for block in found) < 4096
        np.testing.assert_array_equal(
            np.concatenate([b.neighbours for b in found]), next(iter(whole)).neighbours
        )
        np.testing.assert_array_equal(whole.breadth_first(), pieces.breadth_first())
    assert list(tmp_path.iterdir()) == []


def test_ldg_never_holds_mapped_edges_whole(tmp_path: Path) -> None:
    num_nodes, num_edges = 2000, 1_000_000
    edge_index = np.random.default_rng(0).integers(0, num_nodes, (2, num_edges))
    np.save(tmp_path / "edge_index.npy", edge_index)
    mapped = problem(np.load(tmp_path / "edge_index.npy", mmap_mode="r"), num_nodes, 4)
    del edge_index
    for _ in range(2):  # the first time compiles
        tracemalloc.start()
        try:
            with blocks.Blocks(mapped.edges, num_nodes, None, 2**20) as pieces:
                assert pieces.on_disk
                assert sum(block.neighbours.size for block in pieces) > 1.9 * num_edges
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    # The edges take 16 MB and their adjacency 8 MB.
    assert peak < 2 * 2**20


def test_mapped_edges_are_read_in_raw_order(tmp_path: Path) -> None:
    edge_index = planted()
    weight = np.arange(edge_index.shape[1], dtype=np.float32)
    np.save(tmp_path / "e.npy", edge_index)
    mapped = ArrayEdges(np.load(tmp_path / "e.npy", mmap_mode="r"), weight, src_offset=5, dst_offset=7)
    chunks = list(mapped.chunks(1000))
    assert max(src.size for src, _, _ in chunks) == 1000
    np.testing.assert_array_equal(np.concatenate([src for src, _, _ in chunks]), edge_index[0] + 5)
    np.testing.assert_array_equal(np.concatenate([dst for _, dst, _ in chunks]), edge_index[1] + 7)
    np.testing.assert_array_equal(np.concatenate([w for _, _, w in chunks]), weight)


def test_changes_to_a_private_map_survive_reading(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.zeros((2, 5000), dtype=np.int64))
    private = np.load(tmp_path / "e.npy", mmap_mode="c")
    private[:] = 3
    for _ in range(2):
        assert all((src == 3).all() for src, _, _ in ArrayEdges(private).chunks(100))


def test_joined_edges_give_weight_one_where_there_is_none() -> None:
    plain, heavy = np.array([[0, 1], [1, 2]]), np.array([[2], [3]])
    joined = JoinedEdges([ArrayEdges(plain), ArrayEdges(heavy, np.array([5]))])
    graph = symmetrise(joined, 4)
    assert (joined.num_edges, joined.weighted) == (3, True)
    assert graph.weights.tolist() == [1, 1, 1, 1, 5, 5]
    assert symmetrise(JoinedEdges([ArrayEdges(plain)]), 4).weights is None


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


def test_deal_spreads_masks_and_heavy_nodes() -> None:
    generator = np.random.default_rng(0)
    masks = np.eye(3)[generator.integers(0, 3, 1000)]
    parts = deal(masks, 7, seed=1)
    for column in (*masks.T, np.ones(1000)):
        loads = np.bincount(parts, weights=column, minlength=7)
        assert loads.max() - loads.min() <= 2
    weight = generator.pareto(2, 1000)
    loads = np.bincount(deal(weight[:, None], 7, seed=1), weights=weight, minlength=7)
    assert loads.max() - loads.min() <= weight.max()


def test_best_possible_is_reached_by_no_less() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        weight, num_parts = generator.integers(0, 6, 6), int(generator.integers(1, 4))
        optimum = min(
            np.bincount(parts, weights=weight, minlength=num_parts).max()
            for parts in itertools.product(range(num_parts), repeat=6)
        )
        assert weight.sum() / num_parts <= best_possible(weight, num_parts) <= optimum
    assert best_possible(np.ones(10, dtype=bool), 4) == 3
    assert best_possible(np.array([2, 2, 2]), 2) == 4
    assert best_possible(np.zeros(5), 2) == 0


def test_a_miss_is_warned_about_with_the_figure_and_grains_are_not() -> None:
    p = problem(NO_EDGES, 4, 2, {"a": np.array([1.0, 1, 1, 1]), "b": np.array([9.0, 1, 1, 1])})
    with pytest.warns(
        PartitionBalanceWarning, match=r"'a'.*holds 3, 1\.500 times the mean 2; .*1\.050"
    ) as caught:
        check_balance(p, np.array([0, 1, 1, 1], dtype=np.int32), 1.05, "x")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_balance(problem(NO_EDGES, 3, 8), np.arange(3, dtype=np.int32), 1.05, "x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problem(STAR, 100, 0), "num_parts must be at least 1, found 0"),
        (lambda: problem(STAR, -1, 2), "num_nodes must not be negative"),
        (lambda: problem(STAR, 100, 2, seed=-1), "seed must be in"),
        (lambda: problem(STAR, 100, 2, {"w": np.ones(99)}), r"'w' must have .*\[100\], found \[99\]"),
        (
            lambda: problem(STAR, 100, 2, {"w": np.array([1.0] * 99 + [np.nan])}),
            "'w' must be finite.*node 99",
        ),
        (lambda: problem(STAR, 100, 2, {"w": np.arange(100) - 5}), r"found -5 at node 0 \(5 such nodes\)"),
        (lambda: problem(STAR, 100, 2, {"w": np.array(["a"] * 100)}), "'w' must hold numbers"),
        (lambda: problem(STAR[0], 100, 2), r"shape \[2, num_edges\]"),
        (lambda: problem(STAR.astype(float), 100, 2), "must hold integers, found float64"),
        (lambda: problem(STAR, 100, 2, edge_weight=np.ones(3)), r"\[99\], found \[3\]"),
    ],
)
def test_bad_problems_are_refused(make: Callable[[], Problem], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        make()


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("spectral", {}, "Unknown partitioning algorithm 'spectral'; known are ldg, lgd, metis, multi"),
        ("ldg", {"pases": 3}, "'ldg' takes no option 'pases'; it accepts passes, slack, order, memory_bytes"),
        ("random", {"x": 3}, "accepts none"),
        ("ldg", {"passes": 0}, "passes >= 1"),
        ("ldg", {"order": "dfs"}, "order must be one of bfs, natural, random, found 'dfs'"),
        ("metis", {"objective": "speed"}, "objective must be 'cut' or 'volume', found 'speed'"),
        ("metis", {"objective": "volume", "recursive": True}, "k-way only"),
        ("multi-constraint-metis", {"ubvec": 1.0}, "ubvec must be above 1"),
        ("multi-constraint-metis", {"ubvec": [1.1, 1.1]}, r"one per node weight \(1\)"),
    ],
)
def test_bad_options_are_refused(algorithm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        registry.assign(algorithm, problem(STAR, 100, 2), **options)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_edges_that_lead_nowhere_are_refused(algorithm: str) -> None:
    with pytest.raises(PartitionError, match=r"names node 99; ids must be in 0 \.\. 49"):
        registry.assign(algorithm, problem(STAR[:, ::-1], 50, 2))
    with pytest.raises(PartitionError, match="not negative, found -1"):
        registry.assign(algorithm, problem(STAR, 100, 2, edge_weight=np.full(99, -1.0)))


def test_names_and_aliases() -> None:
    assert registry.names() == ALGORITHMS
    assert registry.canonical("lgd") == "ldg"


def test_a_new_algorithm_is_one_function() -> None:
    @registry.register("halves", target=lambda options: 3.0)
    def halves(problem: Problem, *, swap: bool = False) -> Array:
        return (np.arange(problem.num_nodes) % 2 == swap).astype(np.int32)

    try:
        assert registry.assign("halves", problem(STAR, 100, 2), swap=True)[:2].tolist() == [0, 1]
    finally:
        del registry._ALGORITHMS["halves"], registry._CANONICAL["halves"]
