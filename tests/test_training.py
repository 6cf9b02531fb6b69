r"""Setting workers up, exact metrics, and what all workers do together."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import Gang, launch

from partpar import training
from partpar.errors import GraphError, RouteError
from partpar.graph import GraphData
from partpar.nn import route_model
from partpar.route import Route
from partpar.training import machine, setup
from partpar.training.metrics import MetricError
from partpar.variables import NETWORK_FLAG

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}


# --- the environment
# --------------------------------------------------------------------------------------------


def test_without_a_launcher_a_process_is_alone() -> None:
    launch_ = setup.read_environment({"PATH": "/bin"})
    assert (launch_.rank, launch_.world_size, launch_.launched) == (0, 1, False)


def test_the_environment_of_torchrun_is_read() -> None:
    env = {**LAUNCHED, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.7"}
    found = setup.read_environment(env)
    assert found == setup.Launch(1, 0, 2, 1, "10.0.0.7", 29500)
    assert not found.one_machine
    assert setup.read_environment(LAUNCHED) == setup.Launch(1, 1, 2, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "RANK=1, MASTER_PORT=29500 without WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE=2, MASTER_PORT=29500 without RANK"),
        ({"MASTER_PORT": None}, "RANK=1, WORLD_SIZE=2 without MASTER_PORT"),
        (
            {"MASTER_PORT": "http"},
            "MASTER_PORT must be an integer from 1 to 65535, but the environment says 'http'",
        ),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be an integer from 1 to 65535"),
        ({"RANK": "2"}, "RANK must be an integer from 0 to 1, but the environment says '2'"),
        ({"RANK": "-1"}, "RANK must be an integer from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer from 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE must be an integer from 1 to 2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK must be an integer from 0 to 1"),
    ],
)
def test_a_broken_environment_is_named(change: dict[str, str | None], message: str) -> None:
    env = {name: value for name, value in {**LAUNCHED, **change}.items() if value is not None}
    with pytest.raises(setup.SetupError, match=message):
        setup.read_environment(env)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(setup.SetupError, match="'cuda' was asked for, but"):
        setup.choose_device("cuda", setup.Launch())
    with pytest.raises(setup.SetupError, match="must be 'cpu' or 'cuda', but found 'meta'"):
        setup.choose_device("meta", setup.Launch())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert setup.choose_device("cuda", setup.Launch(3, 3, 4, 4)) == torch.device("cuda", 1)
    with pytest.raises(setup.SetupError, match="'cuda:2' was asked for, but this machine has 2 GPU"):
        setup.choose_device("cuda:2", setup.Launch())


def test_workers_that_share_a_gpu_talk_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    two, four = setup.Launch(0, 0, 2, 2), setup.Launch(0, 0, 4, 4)
    assert setup.choose_backend(None, cpu, two) == "gloo"
    assert setup.choose_backend(None, gpu, two, torch.device("cuda")) == "nccl"
    assert setup.choose_backend(None, gpu, four, torch.device("cuda")) == "gloo"
    assert setup.choose_backend(None, gpu, two, torch.device("cuda:0")) == "gloo"
    assert setup.choose_backend("gloo", gpu, two) == "gloo"
    with pytest.raises(setup.SetupError, match="needs device 'cuda', but the device is 'cpu'"):
        setup.choose_backend("nccl", cpu, two)
    with pytest.raises(setup.SetupError, match="must be 'gloo' or 'nccl', but found 'mpi'"):
        setup.choose_backend("mpi", cpu, two)


def test_a_network_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = setup.Launch(0, 0, 4, 2, "10.0.0.7", 29500)
    monkeypatch.delenv(NETWORK_FLAG, raising=False)
    with pytest.raises(
        setup.SetupError, match="4 workers, 2 of them on this machine, would talk over the network"
    ):
        setup._keep_to_this_machine(spread, allow_network=False)
    setup._keep_to_this_machine(spread, allow_network=True)
    monkeypatch.setenv(NETWORK_FLAG, "1")
    setup._keep_to_this_machine(spread, allow_network=False)


def test_arguments_are_checked_first() -> None:
    with pytest.raises(setup.SetupError, match="timeout must be more than 0 seconds, but found 0"):
        training.init(timeout=0)
    with pytest.raises(setup.SetupError, match="threads must be at least 1, but found 0"):
        training.init(threads=0)


def _set_up(worker: Any) -> dict[str, Any]:
    with training.init(timeout=20, quiet=True) as context:
        facts = {
            "rank": context.rank,
            "size": context.world_size,
            "backend": context.backend,
            "threads": torch.get_num_threads(),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
            "sum": float(training.all_numbers([context.rank], context.group).sum()),
            "again": training.init(quiet=True, threads=2).owns_group,
            "chosen": torch.get_num_threads(),
        }
    context.close()
    return {**facts, "closed": not torch.distributed.is_initialized()}


def test_two_workers_are_set_up_and_torn_down() -> None:
    facts = launch(_set_up, 2, init=False)
    threads = max(1, machine.usable_cores() // 2)
    assert [fact["rank"] for fact in facts] == [0, 1]
    for fact in facts:
        assert (fact["size"], fact["backend"], fact["interface"]) == (2, "gloo", "lo")
        assert (fact["threads"], fact["chosen"]) == (threads, 2)
        assert fact["sum"] == 1.0
        assert not fact["again"], "who did not begin the process group must not end it"
        assert fact["closed"]


def test_threads_that_the_user_named_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, launched = setup.Launch(), setup.Launch(0, 0, 2, 2, master_port=29500)
    for omp, flag, of_alone, of_launched in (
        (None, None, False, False),
        ("1", None, True, False),  # torchrun's own
        ("1", "1", True, True),
        ("3", None, True, True),
    ):
        for name, value in (("OMP_NUM_THREADS", omp), ("PARTPAR_KEEP_THREADS", flag)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert setup._threads_are_given(alone) == of_alone
        assert setup._threads_are_given(launched) == of_launched


def test_alone_there_is_no_process_group(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with training.init(threads=1, allocator=False) as context:
        assert (context.rank, context.world_size, context.group, context.backend) == (0, 1, None, None)
        assert context.is_first
    said = capfd.readouterr().err
    assert "1 worker(s) on cpu, no process group, 1 thread(s) each, allocator as the system sets it" in said


def _wait_in_vain(worker: Any) -> None:
    with training.init(timeout=2, quiet=True) as context:
        if context.rank == 0:
            training.all_numbers([1.0], context.group)


@pytest.mark.faults
def test_a_worker_that_does_not_come_is_not_waited_for_forever() -> None:
    outcomes = launch(_wait_in_vain, 2, init=False, check=False, timeout=60)
    assert outcomes[0].error is not None or outcomes[0].exit_code, "rank 0 must fail, not hang"
    assert not outcomes[0].late


# --- together
# -----------------------------------------------------------------------------------------------------


def _first(worker: Any) -> list[Any]:
    value = training.first_rank(lambda: {"folder": "x", "by": worker.rank}, worker.group)
    return [value, training.first_rank(lambda: None, worker.group)]


@pytest.mark.core_on(2)
def test_rank_0_works_for_all(gang: Gang, world_size: int) -> None:
    assert gang.run(_first, world_size) == [[{"folder": "x", "by": 0}, None]] * world_size


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


# --- the machine
# --------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_was_freed_until_it_is_forgotten() -> None:
    before = training.peak_memory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    held = training.peak_memory()
    assert held >= before
    assert held > 64 << 20
    if training.forget_peak_memory():
        assert training.peak_memory() <= held


def _how_blocks_are_made(worker: Any) -> tuple[bool, str]:
    return machine.huge_pages(), setup._set_allocator()


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_huge_pages_spare_the_allocator_its_hoarding() -> None:
    assert launch(_how_blocks_are_made, 1, env={"THP_MEM_ALLOC_ENABLE": "1"}) == [(True, "with huge pages")]
    [(huge, how)] = launch(_how_blocks_are_made, 1, env={"THP_MEM_ALLOC_ENABLE": "0"})
    assert not huge
    assert how in ("keeps freed blocks", "as the system sets it")


def test_the_allocator_is_left_alone_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not training.tune_allocator()


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
