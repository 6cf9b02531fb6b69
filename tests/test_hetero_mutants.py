r"""Mistakes put in on purpose into typed and temporal training, each of which the comparison with one process must notice;
listed in ``MUTANTS.rst``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_hetero
import test_snapshots
import torch
from gang import Gang, GangError, Worker
from test_hetero import cut
from torch import Tensor
from typed_models import HIDDEN, Runs, errors, reference, worker_case

from partpar import GraphData, HeteroRoute, hetero_route
from partpar.graph import Windows
from partpar.nn import ahead, han, hetero_conv, hgt, rgcn, typed_graph_module

assert cut  # the fixture
route_model_file = sys.modules["partpar.nn.route_model"]  # whose name in the package is that of the function
Patch = pytest.MonkeyPatch


def _of_halo(patch: Patch, change: Callable[[str, Tensor], Tensor]) -> None:
    wait = hetero_route.HeteroInFlight.wait_halo
    patch.setattr(
        hetero_route.HeteroInFlight, "wait_halo", lambda self: {t: change(t, r) for t, r in wait(self).items()}
    )


def lose_the_last_type(patch: Patch) -> None:
    _of_halo(patch, lambda node_type, rows: rows * (node_type != "d"))


def swap_rows_of_a_type(patch: Patch) -> None:
    _of_halo(patch, lambda node_type, rows: rows.flip(0) if node_type == "b" else rows)


def keep_gradients_of_a_type(patch: Patch) -> None:
    _of_halo(patch, lambda node_type, rows: rows.detach() if node_type == "b" else rows)


def weigh_relations_locally(patch: Patch) -> None:
    patch.setattr(han, "exchange", SimpleNamespace(all_reduce_sum=lambda x, group: x))


def weigh_relations_by_local_gradients(patch: Patch) -> None:
    reduce = han.exchange.all_reduce_sum
    patch.setattr(
        han, "exchange", SimpleNamespace(all_reduce_sum=lambda x, group: x + (reduce(x, group) - x).detach())
    )


def one_prior_for_all_relations(patch: Patch) -> None:
    join = hgt.join
    patch.setattr(hgt, "join", lambda pieces: (join(pieces)[0], join(pieces)[1] * 0))


def one_map_for_all_relations(patch: Patch) -> None:
    make = rgcn._Relation
    patch.setattr(rgcn, "_Relation", lambda adj, given, rows, weight: make(adj, given, rows, weight._base[0]))


def means_over_all_relations(patch: Patch) -> None:
    join = rgcn.join
    patch.setattr(rgcn, "join_means", lambda adjs, dtype: ((whole := join(adjs)[0]), whole.mean_weight(dtype)))


def products_without_gradients_of_rows(patch: Patch) -> None:
    multiply = rgcn.stacked_products
    patch.setattr(rgcn, "stacked_products", lambda rows, weights: multiply([r.data for r in rows], weights))


def statistics_of_one_worker(patch: Patch) -> None:
    patch.setattr(route_model_file, "_GiveRoute", lambda **_: lambda module, args, kwargs: (args, kwargs))


def exchange_for_the_first_relation_only(patch: Patch) -> None:
    fetch = typed_graph_module._fetch

    def mutant(inputs: dict[str, Any], route: HeteroRoute | None) -> dict[str, Any]:
        out, first = fetch(inputs, route), next(iter(inputs))
        return {
            name: pair if name == first else (torch.cat([pair[0][:1] * 0 + pair[0].mean(), pair[0][1:]]), pair[1])
            for name, pair in out.items()
        }

    patch.setattr(typed_graph_module, "_fetch", mutant)


def skip_relations_without_edges(patch: Patch) -> None:
    run = hetero_conv.run

    def mutant(conv: Any, pair: Any, edges: Any, *more: Any) -> Tensor:
        if edges.num_edges == 0:
            rows = pair[1].new_zeros(pair[1].size(0), HIDDEN, requires_grad=True)
            return rows + 0 * (pair[0].sum() + pair[1].sum())  # gradients go on to the layer before
        return run(conv, pair, edges, *more)

    patch.setattr(hetero_conv, "run", mutant)


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (lose_the_last_type, "rgcn"),
    (swap_rows_of_a_type, "sage"),
    (keep_gradients_of_a_type, "mixed"),
    (weigh_relations_locally, "han"),
    (weigh_relations_by_local_gradients, "han"),
    (one_prior_for_all_relations, "hgt"),
    (one_map_for_all_relations, "rgcn"),
    (statistics_of_one_worker, "to_hetero"),
    (exchange_for_the_first_relation_only, "to_hetero"),
]


MULTIPLIED = (means_over_all_relations, products_without_gradients_of_rows)


def mutated(
    worker: Worker, root: Path, name: str, mutate: Callable[[Patch], None] | None, algorithm: str = "random"
) -> Runs:
    with Patch.context() as patch:
        if mutate is not None:
            mutate(patch)
        return worker_case(worker, root, "generated", algorithm, "adj", 3, (name,))


@pytest.mark.parametrize(("mutate", "name"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_mutant_is_noticed(gang: Gang, cut: Any, mutate: Callable[[Patch], None], name: str) -> None:
    root, expected = cut("generated", "random", 3), reference("generated", 3, (name,))
    found = gang.run(mutated, 3, root, name, mutate)
    assert max(max(errors(runs, expected).values()) for runs in found) > 1e-6


@pytest.mark.parametrize("name", sorted({name for _, name in MUTANTS}))
def test_without_a_mutant_all_agree(gang: Gang, cut: Any, name: str) -> None:
    root, expected = cut("generated", "random", 3), reference("generated", 3, (name,))
    found = gang.run(mutated, 3, root, name, None)
    assert max(max(errors(runs, expected).values()) for runs in found) < 1e-10


@pytest.mark.parametrize("mutate", MULTIPLIED, ids=[mutate.__name__ for mutate in MULTIPLIED])
def test_mutant_of_multiplied_sources_is_noticed(monkeypatch: Patch, mutate: Callable[[Patch], None]) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="Tensor-likes are not"):
        test_hetero.test_rgcn_multiplies_on_the_cheaper_side()


def test_parameters_left_out_by_an_empty_part_are_noticed(gang: Gang, cut: Any) -> None:
    for mutate in (None, skip_relations_without_edges):
        arguments = (mutated, 2, cut("generated", "given", 2), "sage", mutate, "given")
        if mutate is None:
            gang.run(*arguments)
        else:
            with pytest.raises(GangError, match="a rank leaves parameters out"):
                gang.run(*arguments)


# --- over time -----------------------------------------------------------------------------------------------------


def rows_of_the_first_snapshot(patch: Patch) -> None:
    begin = ahead.fetch_ahead
    patch.setattr(
        test_snapshots, "fetch_ahead", lambda snapshots, rows_of: begin(snapshots, lambda s: rows_of(snapshots[0]))
    )


def forget_the_state(patch: Patch) -> None:
    forward = torch.nn.GRUCell.forward
    patch.setattr(torch.nn.GRUCell, "forward", lambda self, x, state=None: forward(self, x))


def edges_of_all_windows(patch: Patch) -> None:
    patch.setattr(Windows, "mask", lambda self, window, time: time >= self.boundaries[window])


def pairs_of_one_worker(patch: Patch) -> None:
    make = test_snapshots.make_pairs

    def mutant(snapshot: Any, num_nodes: int, *args: Any) -> Any:
        return make(snapshot, num_nodes // 2, *args)

    patch.setattr(test_snapshots, "make_pairs", mutant)


OVER_TIME = [rows_of_the_first_snapshot, forget_the_state, edges_of_all_windows, pairs_of_one_worker]


def mutated_in_time(
    worker: Worker, root: Path, state: dict[str, Tensor], mutate: Callable[[Patch], None] | None
) -> Runs:
    with Patch.context() as patch:
        if mutate is not None:
            mutate(patch)
        return test_snapshots.worker_case(worker, root, "random", state, 2)[0]


@pytest.mark.parametrize("mutate", [None, *OVER_TIME], ids=lambda mutate: getattr(mutate, "__name__", "none"))
def test_mutant_over_time_is_noticed(gang: Gang, tmp_path: Path, mutate: Any) -> None:
    whole = GraphData.from_pyg_data(test_snapshots.temporal("generated"))
    whole.partition_graph(tmp_path, 2, algorithm="random", time_attr="t", num_snapshots=test_snapshots.WINDOWS)
    state, expected = test_snapshots.reference("generated", 2)
    worst = max(
        max(errors(runs, expected).values()) for runs in gang.run(mutated_in_time, 2, tmp_path, state, mutate)
    )
    assert worst < 1e-10 if mutate is None else worst > 1e-6


def test_all_are_listed() -> None:
    listed = Path(__file__).with_name("MUTANTS.rst").read_text()
    names = [mutate.__name__ for mutate, _ in MUTANTS] + [mutate.__name__ for mutate in (*MULTIPLIED, *OVER_TIME)]
    names.append(skip_relations_without_edges.__name__)
    assert [name for name in names if f"``{name}``" not in listed] == []
