r"""Mistakes put into loaders, blocks and inference on purpose; the comparisons that others make must notice each. Listed in
``MUTANTS.rst``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from graphs import directed_graph
from partpar.models import GraphSAGE
from parts import parts_of
from torch import Tensor

from partpar import GraphData
from partpar.errors import StaleIteratorError
from partpar.kernels.adjacency import Adjacency
from partpar.sampling import DistNeighborLoader, batches, blocks, inputs, loader
from partpar.serving import Service
from partpar.training import full_graph_inference, inference

Patch = pytest.MonkeyPatch


def rows_by_raw_id(patch: Patch) -> None:
    fetch = batches.BatchMaker.fetch

    def mutant(self: Any, out: Any) -> Any:
        object.__setattr__(out, "ids", out.raw_ids)
        return fetch(self, out)

    patch.setattr(batches.BatchMaker, "fetch", mutant)


def edge_rows_by_raw_id(patch: Patch) -> None:
    fetch = batches.BatchMaker.fetch

    def mutant(self: Any, out: Any) -> Any:
        object.__setattr__(out, "edge_rows", out.edge)
        return fetch(self, out)

    patch.setattr(batches.BatchMaker, "fetch", mutant)


def forget_the_last_seed(patch: Patch) -> None:
    bounds = inputs.Steps.bounds
    patch.setattr(inputs.Steps, "bounds", lambda self, number: bounds(self, number)[: self.batch_size - 1])


def one_order_for_all_epochs(patch: Patch) -> None:
    patch.setattr(loader, "shuffled", lambda count, seed, epoch: inputs.shuffled(count, seed, 0))


def order_of_the_process(patch: Patch) -> None:
    patch.setattr(loader, "shuffled", lambda count, seed, epoch: torch.randperm(count))


def one_key_for_all_batches(patch: Patch) -> None:
    key = batches.BatchKey
    patch.setattr(batches, "BatchKey", lambda seed, epoch, number: key(seed, 0, 0))


def end_the_stale_quietly(patch: Patch) -> None:
    close = loader._Epoch.close
    patch.setattr(loader._Epoch, "close", lambda self, stale=False: close(self))


def ids_are_raw_ids(patch: Patch) -> None:
    patch.setattr(loader.DistLoader, "ids_of", lambda self, raw_ids, node_type=None: raw_ids)


LOADER = (
    end_the_stale_quietly, ids_are_raw_ids,
    rows_by_raw_id, edge_rows_by_raw_id, forget_the_last_seed, one_order_for_all_epochs, order_of_the_process,
    one_key_for_all_batches,
)  # fmt: skip


def check_loader(service: Service) -> None:
    r"""Rows are those of their ids; every seed comes once; epochs differ, and come again alike."""
    data = directed_graph()

    def run() -> list[list[Any]]:
        made = DistNeighborLoader(service, [2, 2], torch.arange(60), batch_size=7, shuffle=True, seed=3)
        return [list(made), list(made)]

    first, again = run(), run()
    for epoch, other in zip(first, again, strict=True):
        for one, two in zip(epoch, other, strict=True):
            assert torch.equal(one.x, data.x[one.n_id])
            assert torch.equal(one.edge_attr, data.edge_attr[one.e_id])
            assert torch.equal(one.e_id, two.e_id)
        assert sorted(i for b in epoch for i in b.n_id[: b.batch_size].tolist()) == list(range(60))
    assert not torch.equal(first[0][0].input_id, first[1][0].input_id)
    fixed = DistNeighborLoader(service, [1], torch.zeros(8, dtype=torch.int64) + 5, batch_size=1)
    found = service.fetch("node", ["raw_ids"], fixed.ids_of(torch.arange(60)))["raw_ids"]
    assert torch.equal(found, torch.arange(60)), "a table's rows are those of the batch's nodes"
    stale, _ = iter(fixed), next(iter(fixed))
    with pytest.raises(StaleIteratorError):
        list(stale)
    drawn = {tuple(b.e_id.tolist()) for _ in range(3) for b in fixed}
    assert len(drawn) > 1, "one node draws anew in each batch"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return parts_of(directed_graph(), 3, tmp_path_factory.mktemp("mutants"))


def test_the_loader_passes(service: Service) -> None:
    check_loader(service)


@pytest.mark.parametrize("mutant", LOADER, ids=lambda m: m.__name__)
def test_a_mutant_of_the_loader_is_noticed(service: Service, mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError, pytest.fail.Exception)):
        check_loader(service)


# --- blocks ---------------------------------------------------------------------------------------------------------


def blocks_turned_round(found: list[Adjacency]) -> list[Adjacency]:
    return found[::-1]


def an_edge_less(found: list[Adjacency]) -> list[Adjacency]:
    first = found[0]
    indptr = first.indptr.clamp(max=first.num_edges - 1)
    return [Adjacency(indptr, first.indices[:-1], first.num_src, first.num_dst), *found[1:]]


def another_source(found: list[Adjacency]) -> list[Adjacency]:
    first = found[0]
    return [Adjacency(first.indptr, first.indices.flip(0), first.num_src, first.num_dst), *found[1:]]


@pytest.mark.parametrize("mutant", [None, blocks_turned_round, an_edge_less, another_source])
def test_a_mutant_of_the_blocks_is_noticed(mutant: Callable[[list[Adjacency]], list[Adjacency]] | None) -> None:
    data = directed_graph()
    torch.manual_seed(0)
    theirs, ours = pyg.GraphSAGE(8, 6, 2, 4).double(), GraphSAGE(8, 6, 2, 4).double()
    ours.load_state_dict(theirs.state_dict())
    batch = next(iter(DistNeighborLoader(data, [3, 3], batch_size=20)))
    expected = theirs(batch.x, batch.edge_index)[:20]

    def differ(found: list[Adjacency]) -> bool:
        try:
            return bool((ours(batch.x, found) - expected).abs().max() > 1e-10)
        except ValueError:
            return True

    assert differ(blocks(batch) if mutant is None else mutant(blocks(batch))) == (mutant is not None)


# --- inference ------------------------------------------------------------------------------------------------------


def in_the_order_of_the_share(patch: Patch) -> None:
    patch.setattr(torch.Tensor, "argsort", lambda self, *args, **kwargs: torch.arange(self.numel()))


def forget_the_activation(patch: Patch) -> None:
    patch.setattr(inference, "_after", lambda model, i, rows: rows)


def forget_other_chunks(patch: Patch) -> None:
    chunk = inference._chunk

    def mutant(adj: Adjacency, first: int, last: int) -> tuple[Adjacency, Tensor]:
        block, needed = chunk(adj, first, last)
        return block, torch.cat([needed[: last - first], needed[: needed.numel() - (last - first)] * 0])

    patch.setattr(inference, "_chunk", mutant)


@pytest.mark.parametrize("mutant", [None, in_the_order_of_the_share, forget_the_activation, forget_other_chunks])
def test_a_mutant_of_inference_is_noticed(
    mutant: Callable[[Patch], None] | None, monkeypatch: Patch, tmp_path: Path
) -> None:
    data = directed_graph()
    torch.manual_seed(0)
    model = pyg.GraphSAGE(8, 6, 2, 4).double()
    expected = model(data.x, data.edge_index)
    order = torch.randperm(60)
    graph = GraphData.from_pyg_data(data)
    graph.node()["raw_ids"] = order  # rows stand in another order than raw ids
    with monkeypatch.context() as patch:
        if mutant is not None:
            mutant(patch)
        out = full_graph_inference(model, graph, chunk_size=7)
    assert bool((out[order] - expected).abs().max() > 1e-10) == (mutant is not None)
