r"""LDG: its rule, its bounds, and edges that stay on disk."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from problems import cut_share, imbalance, planted, problem, real

from partpar.partition import blocks, registry
from partpar.partition.problem import ArrayEdges, JoinedEdges
from partpar.partition.symmetrise import symmetrise

MESHES = ["mesh_4elt", "mesh_wing", "mesh_fe_4elt2"]


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
