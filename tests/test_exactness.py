r"""Partitioning changes speed and memory, never results: training on 1 to 4 workers against PyG's own classes
in one process, for every model, graph, partitioning algorithm and a partition with an empty part, any two of them
together.

Errors are max ``|a - b| / max(1, |b|)`` unless said otherwise.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph, load_npz_graph
from pairs import rank_cases
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data

from partpar import GraphData, models, nn
from partpar.nn import global_mean

STEPS = 20
DEVICE = os.environ.get("PARTPAR_TEST_DEVICE", "cpu")  # of the workers; the reference is always the CPU's
WAYS = {
    "edge_index": "PyG's own propagation, message by message",
    "adj": "kernels, interior and halo apart, partial sums",
    "kept": "the same, and the halo of the input fetched once",
    "recompute": "the same, and layers run again in the backward pass",
}
GRAPHS = ("directed", "cora", "citeseer")
ALGORITHMS = ("metis", "multi-constraint-metis", "ldg", "random", "given")
ZOO, USERS = ("GCN", "GraphSAGE", "GAT", "GIN"), "user's"
OPTIONS = {"GAT": {"heads": 2}}


class PlainConv(pyg.MessagePassing):
    r"""A layer as a user of PyG writes it: the mean of gated neighbours."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="mean")
        self.gate = torch.nn.Linear(2 * in_channels, 1)
        self.linear = torch.nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return self.gate(torch.cat([x_i, x_j], -1)).sigmoid() * x_j

    def update(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class UserConv(PlainConv):
    r"""The same with the one line."""

    def forward(self, x: Tensor, edge_index: Tensor, route: Any) -> Tensor:  # type: ignore[override]
        dst_len = x.size(0)
        x = route.apply(x)
        return self.propagate(edge_index, x=x)[:dst_len]


class PlainNet(torch.nn.Module):
    conv, norm = PlainConv, pyg.BatchNorm

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.first, self.second = self.conv(in_channels, hidden), self.conv(hidden, hidden)
        self.between, self.lin = self.norm(hidden), torch.nn.Linear(hidden, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.lin(self.second(self.between(self.first(x, edge_index)), edge_index))


class UserNet(PlainNet):
    conv, norm = UserConv, nn.BatchNorm

    def forward(self, x: Tensor, edge_index: Tensor, route: Any) -> Tensor:  # type: ignore[override]
        x = self.between(self.first(x, edge_index, route), route)
        return self.lin(self.second(x, edge_index, route))


def build(zoo: Any, data: Any, **options: Any) -> torch.nn.ModuleDict:
    r"""All of PyG's models (``zoo`` is :mod:`torch_geometric.nn`) or ours (:mod:`partpar.models`)."""
    torch.manual_seed(1)
    num_features, num_classes = data["num_features"], data["num_classes"]
    built = {
        name: getattr(zoo, name)(
            num_features, 8, 2, num_classes, norm="batch_norm", **OPTIONS.get(name, {}), **options
        )
        for name in ZOO
    }
    built[USERS] = (PlainNet if zoo is pyg else UserNet)(num_features, 8, num_classes)
    return torch.nn.ModuleDict(built)


class Losses(torch.nn.Module):
    r"""``[models]``, the loss of each. Models have no weight in common, so training them by the sum of their
    losses is training each by its own, and one pass of :class:`DistributedDataParallel` serves all."""

    def __init__(self, built: torch.nn.ModuleDict, loss_of: Callable[[torch.nn.Module], Tensor]) -> None:
        super().__init__()
        self.built, self.loss_of = built, loss_of

    def forward(self) -> Tensor:
        return torch.stack([self.loss_of(model) for model in self.built.values()])


class Run(NamedTuple):
    losses: Tensor  # [steps]
    grads: Tensor  # [steps, parameters]
    weights: Tensor  # [parameters]


class Plan(NamedTuple):
    optimizer: str = "SGD"
    dtype: torch.dtype = torch.float64
    dropout: float = 0.0
    steps: int = STEPS


SGD, ADAM, FLOAT32, DROPOUT = (
    Plan(),
    Plan("Adam"),
    Plan(dtype=torch.float32, steps=1),
    Plan(dropout=0.5, steps=5),
)
PLANS = (SGD, ADAM, FLOAT32)


def train(losses_of: torch.nn.Module, built: torch.nn.ModuleDict, plan: Plan) -> dict[str, Run]:
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    if plan.optimizer == "Adam":
        optimizer = torch.optim.Adam(built.parameters(), lr=0.01)
    losses: list[Tensor] = []
    grads: dict[str, list[Tensor]] = {name: [] for name in built}
    for _ in range(plan.steps):
        optimizer.zero_grad()
        values = losses_of()
        values.sum().backward()
        losses.append(values.detach())
        for name, model in built.items():
            grads[name].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    weights = {
        name: torch.cat([p.detach().flatten() for p in model.parameters()]) for name, model in built.items()
    }
    return {
        name: Run(torch.stack(losses)[:, i].cpu(), torch.stack(grads[name]).cpu(), weights[name].cpu())
        for i, name in enumerate(built)
    }


def worker_case(
    worker: Worker,
    root: Path,
    algorithm: str,
    state: dict[str, Tensor],
    plans: tuple[Plan, ...],
    way: str = "edge_index",
) -> dict[Plan, Any]:
    r"""Trains all models through DDP on this worker's share, by one of :data:`WAYS`."""
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm).to(DEVICE)
    route = share.to_route(worker.group)
    frame, edge_index = share.node("dst"), share.edge_index()
    runs = {}
    for plan in plans:
        built = build(models, share.meta(), **({"dropout": plan.dropout} if plan.dropout else {}))
        built.load_state_dict(state)
        x = frame["x"].to(plan.dtype)
        rows = x if way in ("edge_index", "adj") else nn.keep_halo(x, route)
        built.to(DEVICE)
        for model in built.values():
            model.recompute = way == "recompute"

        def loss_of(model: torch.nn.Module, x: Tensor = x, rows: Any = rows) -> Tensor:
            fast = way != "edge_index" and not isinstance(model, UserNet)
            out = model(rows if fast else x, share.adj() if fast else edge_index, route)
            return global_mean(F.cross_entropy(out, frame["y"], reduction="none"), frame["train_mask"], route)

        losses = Losses(built.to(plan.dtype), loss_of)
        parallel = DistributedDataParallel(losses, process_group=worker.group, broadcast_buffers=False)
        runs[plan] = train(parallel, built, plan)
    return runs


# --- the reference, once per graph --------------------------------------------------------------------------


@functools.cache
def load(graph: str) -> Data:
    if graph == "directed":
        return Data(**directed_graph().to_dict(), num_features=8, num_classes=4)
    data = load_npz_graph(graph)
    project = torch.randn(data.x.size(1), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Data(
        x=F.normalize(data.x.double(), p=1.0) @ project * 4,
        y=data.y.long(),
        edge_index=data.edge_index.long(),
        train_mask=data.train_mask.bool(),
        num_nodes=data.num_nodes,
        num_features=16,
        num_classes=int(data.y.max()) + 1,
    )


@functools.cache
def reference(graph: str) -> tuple[dict[str, Tensor], dict[Plan, dict[str, Run]], dict[str, Tensor]]:
    r"""Initial weights, the runs of PyG's models, and which of their parameters are biases that feed a
    norm."""
    data, runs = load(graph), {}
    for plan in PLANS:
        built = build(pyg, data)
        state = {key: value.clone() for key, value in built.state_dict().items()}

        x = data.x.to(plan.dtype)

        def loss_of(model: torch.nn.Module, x: Tensor = x) -> Tensor:
            return F.cross_entropy(model(x, data.edge_index)[data.train_mask], data.y[data.train_mask])

        runs[plan] = train(Losses(built.to(plan.dtype), loss_of), built, plan)
    feeds = {
        name: torch.cat(
            [torch.full((p.numel(),), feeds_a_norm(name, key, model)) for key, p in model.named_parameters()]
        )
        for name, model in built.items()
    }
    return state, runs, feeds


def feeds_a_norm(name: str, parameter: str, model: torch.nn.Module) -> bool:
    r"""Whether a parameter is a bias that the next norm takes away again: its gradient is 0 but for rounding,
    which Adam blows up to full steps."""
    if (
        name == USERS
        or not parameter.startswith("convs.")
        or not parameter.endswith("bias")
        or ".norms." in parameter
    ):
        return False
    last = parameter.startswith(f"convs.{len(model.convs) - 1}.")
    return not last or ".nn.lins.0." in parameter


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())


@pytest.fixture(scope="session")
def partitions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    r"""``(graph, algorithm, num_parts)`` to the root of that partition, cut once."""
    folder = tmp_path_factory.mktemp("partitions")

    @functools.cache
    def cut(graph: str, algorithm: str, num_parts: int) -> Path:
        data = load(graph)
        node_weight, options = None, {}
        if algorithm == "multi-constraint-metis":
            node_weight = ["#nodes", "train_mask"]
        if algorithm == "given":  # by hand: nobody is in part 0, unless it is the only one
            draw = torch.Generator().manual_seed(num_parts)
            part = (
                torch.randint(1, num_parts, (data.num_nodes,), generator=draw)
                if num_parts > 1
                else torch.zeros(data.num_nodes)
            )
            options = {"assignment": part.long()}
        whole = GraphData.from_pyg_data(data)
        whole.partition_graph(
            folder / graph, num_parts, node_weight, algorithm=algorithm, partition_kwargs=options
        )
        return folder / graph

    return cut


# What the core runs; the soak tests see to it that any two of these values meet.
CORE = [
    *((2, "directed", algorithm, "edge_index") for algorithm in ALGORITHMS[:4]),
    *((n, "directed", "given", "edge_index") for n in (1, 4)),
    *((n, "directed", "metis", "adj") for n in (1, 3)),
    (3, "directed", "given", "adj"),
    (2, "directed", "given", "kept"),
    *((n, "directed", "given", "recompute") for n in (1, 3)),
    (2, "cora", "metis", "edge_index"),
]


@pytest.mark.filterwarnings("ignore:.*balance")
@pytest.mark.parametrize(("world_size", "graph", "algorithm", "way"), rank_cases(CORE, GRAPHS, ALGORITHMS, tuple(WAYS)))
def test_training_is_that_of_one_process(
    gang: Gang, partitions: Any, world_size: int, graph: str, algorithm: str, way: str
) -> None:
    state, expected, feeds = reference(graph)
    root = partitions(graph, algorithm, world_size)
    results = gang.run(worker_case, world_size, root, algorithm, state, PLANS, way, timeout=120)
    wrong = {}
    for rank, runs in enumerate(results):
        for name in (*ZOO, USERS):
            sgd, adam, single = (runs[plan][name] for plan in PLANS)
            sgd_one, adam_one, single_one = (expected[plan][name] for plan in PLANS)
            errors = {
                "SGD losses": error(sgd.losses, sgd_one.losses),
                "SGD gradients": error(sgd.grads, sgd_one.grads),
                "SGD parameters": error(sgd.weights, sgd_one.weights),
                "Adam losses": error(adam.losses, adam_one.losses),
                "Adam parameters": error(adam.weights[~feeds[name]], adam_one.weights[~feeds[name]]),
            }
            wrong |= {(rank, name, what): e for what, e in errors.items() if not e < 1e-10}
            for what in ("losses", "grads"):  # relative to the largest entry
                a, b = getattr(single, what), getattr(single_one, what)
                e = float((a - b).abs().max() / b.abs().max())
                wrong |= {(rank, name, f"float32 {what}"): e} if not e < 1e-5 else {}
    assert not wrong


def test_the_reference_learns() -> None:
    r"""Losses that did not move would agree without saying anything."""
    for plan in (SGD, ADAM):
        for name, run in reference("directed")[1][plan].items():
            assert float(run.losses[-1]) < float(run.losses[0]) - 0.02, name
            assert run.grads.abs().max() > 1e-3


@pytest.mark.parametrize(
    "graph", ["directed", *(pytest.param(graph, marks=pytest.mark.soak) for graph in GRAPHS[1:])]
)
def test_dropout_agrees_for_any_number_of_workers(gang: Gang, partitions: Any, graph: str) -> None:
    state, expected, _ = reference(graph)
    runs = {}
    for case in (
        (1, "metis", "edge_index"),
        (2, "given", "edge_index"),
        (2, "metis", "adj"),
        (3, "metis", "edge_index"),
        (3, "metis", "recompute"),
        (4, "ldg", "kept"),
    ):
        num_parts, algorithm, way = case
        root = partitions(graph, algorithm, num_parts)
        runs[case] = gang.run(worker_case, num_parts, root, algorithm, state, (DROPOUT,), way)[0][DROPOUT]
    for name in ZOO:
        alone = runs[1, "metis", "edge_index"][name]
        assert error(alone.losses, expected[SGD][name].losses[: DROPOUT.steps]) > 1e-3, (
            "dropout does something"
        )
        for where, run in runs.items():
            assert error(run[name].losses, alone.losses) < 1e-10, (name, where)
            assert error(run[name].grads, alone.grads) < 1e-10, (name, where)
