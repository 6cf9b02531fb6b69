r"""The partitioning algorithms on plain arrays: valid, even, the same for the same seed, and good."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from problems import STAR, cut_share, imbalance, planted, problem

from partpar.errors import PartitionError
from partpar.partition import registry
from partpar.partition.balance import PartitionBalanceWarning, best_possible, check_balance
from partpar.partition.problem import Array, Problem
from partpar.partition.random import deal

ALGORITHMS = ["ldg", "metis", "multi-constraint-metis", "random"]


NO_EDGES = np.zeros((2, 0), dtype=np.int64)
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
