r"""Exact metrics, the training loop, and what all workers do together."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import Gang

from partpar import training
from partpar.errors import GraphError, RouteError
from partpar.graph import GraphData
from partpar.nn import route_model
from partpar.route import Route
from partpar.training.metrics import MetricError

# --- together
# -----------------------------------------------------------------------------------------------------


def _first(worker: Any) -> list[Any]:
    value = training.first_rank(lambda: {"folder": "x", "by": worker.rank}, worker.group)
    return [value, training.first_rank(lambda: None, worker.group)]


@pytest.mark.core_on(2)
def test_rank_0_works_for_all(gang: Gang, world_size: int) -> None:
    assert gang.run(_first, world_size) == [[{"folder": "x", "by": 0}, None]] * world_size


def _first_returns(worker: Any, what: Any) -> str:
    return str(training.first_rank(lambda: what, worker.group))


def test_what_rank_0_returns_is_a_plain_value_or_a_path(gang: Gang) -> None:
    assert gang.run(_first_returns, 2, Path("partitions/metis_2")) == ["partitions/metis_2"] * 2
    for _, message in gang.run_expecting_errors(_first_returns, 2, {1, 2}):
        assert "first_rank: expected a value that JSON can carry, or a path, found set" in message


def _first_fails(worker: Any) -> None:
    def work() -> None:
        raise GraphError("no such graph")

    training.first_rank(work, worker.group)


def test_what_fails_on_rank_0_fails_everywhere(gang: Gang) -> None:
    errors = gang.run_expecting_errors(_first_fails, 3)
    assert errors[0] == ("GraphError", "no such graph")
    assert errors[1:] == [("FirstRankError", "rank 0 failed with GraphError: no such graph")] * 2


def _rows(worker: Any) -> list[Any]:
    mine = torch.full((worker.rank, 2), float(worker.rank))
    return [
        training.all_rows(mine, worker.group).tolist(),
        training.all_numbers([worker.rank, 7], worker.group).tolist(),
    ]


@pytest.mark.core_on(1, 3)
def test_rows_and_numbers_of_all_ranks(gang: Gang, world_size: int) -> None:
    rows = [[float(rank)] * 2 for rank in range(world_size) for _ in range(rank)]
    numbers = [[float(rank), 7.0] for rank in range(world_size)]
    assert gang.run(_rows, world_size) == [[rows, numbers]] * world_size


# --- metrics
# ------------------------------------------------------------------------------------------------------


def _predictions(num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    logits = 60 * torch.randn(101, num_classes, generator=draw)
    logits[::4] = logits[0]  # ties, which end up on several ranks
    return logits, torch.randint(num_classes, (101,), generator=draw), torch.rand(101, generator=draw) < 0.6


def _metrics(worker: Any, num_classes: int, name: str, uneven: bool) -> float:
    logits, labels, mask = _predictions(num_classes)
    # Uneven: the last rank holds every row and the others none.
    first = 0 if uneven and worker.rank == worker.world_size - 1 else len(labels) if uneven else worker.rank
    rows = torch.arange(first, len(labels), 1 if uneven else worker.world_size)
    route = Route.from_raw_ids(rows, rows, worker.group)
    return training.measure(name, logits[rows], labels[rows], mask[rows], route)


@pytest.mark.core_on(1, 3)
@pytest.mark.parametrize("uneven", [False, True])
def test_metrics_are_those_of_one_process(gang: Gang, world_size: int, uneven: bool) -> None:
    logits, labels, mask = _predictions(5)
    expected = (logits[mask].argmax(1) == labels[mask]).double().mean().item()
    assert gang.run(_metrics, world_size, 5, "accuracy", uneven) == pytest.approx(
        [expected] * world_size, abs=1e-12
    )

    logits, labels, mask = _predictions(2)
    score = (logits[:, 1] - logits[:, 0])[mask]
    gaps = score[labels[mask] == 1][:, None] - score[labels[mask] == 0][None]
    expected = ((gaps > 0).double() + 0.5 * (gaps == 0)).mean().item()  # Mann and Whitney's count of pairs
    assert gang.run(_metrics, world_size, 2, "auc", uneven) == pytest.approx(
        [expected] * world_size, abs=1e-7
    )


def test_metrics_say_when_they_are_not_defined() -> None:
    logits, labels, mask = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4, dtype=torch.bool)
    assert math.isnan(training.accuracy(logits, labels, ~mask))
    assert math.isnan(training.roc_auc(logits[:, 0], torch.zeros(4, dtype=torch.long), mask))
    with pytest.raises(MetricError, match="the model tells 3 apart"):
        training.roc_auc(logits, labels, mask)
    with pytest.raises(MetricError, match="labels 0 and 1, but found 0 to 2"):
        training.roc_auc(logits[:, :2], labels, mask)
    with pytest.raises(MetricError, match="one of accuracy, auc, but found 'f1'"):
        training.measure("f1", logits, labels, mask)


def test_records_are_lines_and_only_rank_0_writes(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "log.jsonl"
    for rank in (1, 0, 0):
        training.JsonLines(path, rank).write(epoch=1, loss=0.5, val=float("nan"))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"epoch": 1, "loss": 0.5, "val": None}
    ] * 2
    training.JsonLines(None).write(epoch=1)


# --- the loop
# -----------------------------------------------------------------------------------------------------


class _Fixed(torch.nn.Module):
    """Predicts class 0 with a growing, then falling confidence: validation accuracy peaks where the test
    says."""

    def __init__(self, best: int) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.best = best

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, route: Route) -> torch.Tensor:
        if self.training:
            self.passes += 1
        right = 1.0 if int(self.passes) == self.best else -1.0
        return x.new_tensor([right, 0.0]) + 0 * self.bias + x[:, :1] * 0


def _line() -> GraphData:
    from torch_geometric.data import Data

    ones = torch.ones(3, dtype=torch.bool)
    edges = torch.tensor([[0, 1], [1, 2]])
    y = torch.zeros(3, dtype=torch.long)
    return GraphData.from_pyg_data(
        Data(x=torch.ones(3, 1), y=y, edge_index=edges, train_mask=ones, val_mask=ones)
    )


def test_training_stops_early_and_keeps_the_best_weights() -> None:
    model, graph, seen = _Fixed(best=4), _line(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = training.fit(
        model,
        optimizer,
        graph,
        Route.trivial(3),
        epochs=50,
        patience=3,
        on_epoch=lambda **record: seen.append(record),
    )
    assert history.best is not None
    assert history.best.epoch == 4
    assert history.best.val == 1.0
    assert len(history.epochs) == len(seen) == 7
    assert int(model.passes) == 4, "the weights and buffers at the end are those of the best epoch"
    assert math.isnan(history.epochs[0].test), "there are no test rows"
    assert history.peak_bytes[0] > 0
    assert history.exchange_share == [0.0]


def test_where_there_is_no_terminal_epochs_are_a_few_lines(capfd: pytest.CaptureFixture) -> None:
    for shown, lines in ((True, 10), (False, 0)):
        model = _Fixed(best=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training.fit(model, optimizer, _line(), Route.trivial(3), epochs=30, progress=shown)
        said = capfd.readouterr().err
        assert len(said.splitlines()) == lines
        assert "\r" not in said
        assert said.startswith("epoch 3 of 30: loss ") == shown


def test_training_needs_features_labels_and_a_mask() -> None:
    graph = _line()
    del graph.node("dst")["train_mask"], graph.node("dst")["y"]
    model = _Fixed(1)
    with pytest.raises(GraphError, match="found no y, train_mask"):
        training.fit(model, torch.optim.SGD(model.parameters()), graph, Route.trivial(3))


def test_training_names_what_labels_should_be() -> None:
    for wrong, remedy in ((torch.zeros(3), "y.long()"), (torch.zeros(3, 1), "y.squeeze(1).long()")):
        graph, model = _line(), _Fixed(1)
        graph.node()["y"] = wrong
        with pytest.raises(GraphError, match=re.escape(f"found torch.float32 of shape {tuple(wrong.shape)}; use {remedy}")):
            training.fit(model, torch.optim.SGD(model.parameters()), graph, Route.trivial(3))


def test_training_takes_a_model_of_pyg_once_it_is_routed() -> None:
    import torch_geometric.nn as pyg

    graph, plain = _line(), pyg.GraphSAGE(1, 4, 1, 2)
    with pytest.raises(RouteError, match="found GraphSAGE, whose forward takes no route; wrap it by .*route_model"):
        training.fit(plain, torch.optim.SGD(plain.parameters()), graph, Route.trivial(3))
    model = route_model(plain)
    before = model.convs[0].lin_l.weight.clone()
    history = training.fit(model, torch.optim.SGD(model.parameters(), 0.1), graph, Route.trivial(3), epochs=2)
    assert history.losses[1] < history.losses[0] and not torch.equal(before, model.convs[0].lin_l.weight)
