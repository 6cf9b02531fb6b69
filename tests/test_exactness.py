r"""Partitioning changes speed and memory, never results: training on 1 to 4 workers against PyG's own classes in one
process, for every model, graph, partitioning algorithm and a partition with an empty part.

Errors are max ``|a - b| / max(1, |b|)`` unless said otherwise.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph, load_npz_graph
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data

from partpar import GraphData, models, nn
from partpar.nn import global_mean

STEPS = 20
GRAPHS = ("directed", "cora", "citeseer")
ALGORITHMS = ("metis", "multi-constraint-metis", "ldg", "random", "given")
MODELS = ("GCN", "GraphSAGE", "GAT", "GIN", "user's")
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


def build(zoo: Any, name: str, num_features: int, num_classes: int, **options: Any) -> torch.nn.Module:
    r"""PyG's model (``zoo`` is :mod:`torch_geometric.nn`) or ours (:mod:`partpar.models`)."""
    torch.manual_seed(1)
    if name == "user's":
        return (PlainNet if zoo is pyg else UserNet)(num_features, 8, num_classes)
    layers = 3 if num_features == 8 else 2
    return getattr(zoo, name)(num_features, 8, layers, num_classes, norm="batch_norm", **OPTIONS.get(name, {}), **options)


class Run(NamedTuple):
    losses: Tensor  # [steps]
    grads: Tensor  # [steps, parameters]
    weights: Tensor  # [parameters]


def train(model: torch.nn.Module, loss_of: Any, optimizer: str, steps: int) -> Run:
    weights = list(model.parameters())
    optim = torch.optim.SGD(weights, lr=0.1) if optimizer == "SGD" else torch.optim.Adam(weights, lr=0.01)
    losses, grads = [], []
    for _ in range(steps):
        optim.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([w.grad.flatten() for w in weights]))
        optim.step()
    return Run(torch.stack(losses), torch.stack(grads), torch.cat([w.detach().flatten() for w in weights]))


# What is trained, and how: key, optimiser, dtype, dropout, steps.
PLANS = [("SGD", "SGD", torch.float64, 0.0, STEPS), ("Adam", "Adam", torch.float64, 0.0, STEPS), ("float32", "SGD", torch.float32, 0.0, 1)]
DROPOUT = [("dropout", "SGD", torch.float64, 0.5, 5)]


def worker_case(worker: Worker, root: Path, algorithm: str, states: dict[str, Any], plans: list[Any]) -> dict[tuple[str, str], Run]:
    r"""Trains all models through DDP on this worker's share."""
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    route = share.to_route(worker.group)
    frame, edge_index = share.node("dst"), share.edge_index()
    num_classes = share.meta()["num_classes"]
    runs = {}
    for name, state in states.items():
        for key, optimizer, dtype, p, steps in plans:
            x = frame["x"].to(dtype)
            options = {"dropout": p} if p else {}
            model = build(models, name, x.size(1), num_classes, **options)
            model.load_state_dict(state)
            parallel = DistributedDataParallel(model.to(dtype), process_group=worker.group, broadcast_buffers=False)

            def loss_of(model: torch.nn.Module, x: Tensor = x) -> Tensor:
                out = model(x, edge_index, route)
                return global_mean(F.cross_entropy(out, frame["y"], reduction="none"), frame["train_mask"], route)

            runs[name, key] = train(parallel, loss_of, optimizer, steps)
    return runs


# --- the reference, once per graph and model ----------------------------------------------------------------------------


@functools.cache
def load(graph: str) -> Data:
    if graph == "directed":
        return Data(**directed_graph().to_dict(), num_classes=4)
    data = load_npz_graph(graph)
    project = torch.randn(data.x.size(1), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Data(
        x=F.normalize(data.x.double(), p=1.0) @ project * 4,
        y=data.y.long(),
        edge_index=data.edge_index.long(),
        train_mask=data.train_mask.bool(),
        num_nodes=data.num_nodes,
        num_classes=int(data.y.max()) + 1,
    )


@functools.cache
def reference(graph: str, name: str) -> tuple[dict[str, Tensor], dict[str, Run], Tensor]:
    r"""Initial weights, PyG's runs, and which parameters are biases that feed a norm."""
    data, runs = load(graph), {}
    for key, optimizer, dtype, _, steps in PLANS:
        model = build(pyg, name, data.x.size(1), data.num_classes)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model = model.to(dtype)

        def loss_of(model: torch.nn.Module, x: Tensor = data.x.to(dtype)) -> Tensor:
            return F.cross_entropy(model(x, data.edge_index)[data.train_mask], data.y[data.train_mask])

        runs[key] = train(model, loss_of, optimizer, steps)
    feeds = torch.cat([torch.full((p.numel(),), feeds_a_norm(name, k, model)) for k, p in model.named_parameters()])
    return state, runs, feeds


def feeds_a_norm(name: str, parameter: str, model: torch.nn.Module) -> bool:
    r"""Whether a parameter is a bias that the next norm takes away again: its gradient is 0 but for rounding, which
    Adam blows up to full steps."""
    if name == "user's" or not parameter.startswith("convs.") or not parameter.endswith("bias") or ".norms." in parameter:
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
            part = torch.randint(1, num_parts, (data.num_nodes,), generator=draw) if num_parts > 1 else torch.zeros(data.num_nodes)
            options = {"assignment": part.long()}
        whole = GraphData.from_pyg_data(data)
        whole.partition_graph(folder / graph, num_parts, node_weight, algorithm=algorithm, partition_kwargs=options)
        return folder / graph

    return cut


@pytest.mark.filterwarnings("ignore:.*balance")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_training_is_that_of_one_process(gang: Gang, world_size: int, partitions: Any, graph: str, algorithm: str) -> None:
    references = {name: reference(graph, name) for name in MODELS}
    states = {name: state for name, (state, _, _) in references.items()}
    root = partitions(graph, algorithm, world_size)
    results = gang.run(worker_case, world_size, root, algorithm, states, PLANS, timeout=120)
    wrong = {}
    for rank, runs in enumerate(results):
        for name, (_, expected, feeds) in references.items():
            sgd, adam, single = (runs[name, key] for key in ("SGD", "Adam", "float32"))
            errors = {
                "SGD losses": error(sgd.losses, expected["SGD"].losses),
                "SGD gradients": error(sgd.grads, expected["SGD"].grads),
                "SGD parameters": error(sgd.weights, expected["SGD"].weights),
                "Adam losses": error(adam.losses, expected["Adam"].losses),
                "Adam parameters": error(adam.weights[~feeds], expected["Adam"].weights[~feeds]),
            }
            wrong |= {(rank, name, what): e for what, e in errors.items() if not e < 1e-10}
            for what in ("losses", "grads"):  # relative to the largest entry
                a, b = getattr(single, what), getattr(expected["float32"], what)
                e = float((a - b).abs().max() / b.abs().max())
                wrong |= {(rank, name, f"float32 {what}"): e} if not e < 1e-5 else {}
    assert not wrong


@pytest.mark.parametrize("graph", GRAPHS)
def test_dropout_agrees_for_any_number_of_workers(gang: Gang, partitions: Any, graph: str) -> None:
    names = [name for name in MODELS if name != "user's"]
    states = {name: reference(graph, name)[0] for name in names}
    runs = {}
    for num_parts in (1, 2, 3, 4):
        for algorithm in ("metis", "given"):
            root = partitions(graph, algorithm, num_parts)
            runs[num_parts, algorithm] = gang.run(worker_case, num_parts, root, algorithm, states, DROPOUT)[0]
    for name in names:
        alone = runs[1, "metis"][name, "dropout"]
        plain = reference(graph, name)[1]["SGD"]
        assert error(alone.losses, plain.losses[: alone.losses.numel()]) > 1e-3, "dropout does something"
        for where, run in runs.items():
            assert error(run[name, "dropout"].losses, alone.losses) < 1e-10, (name, where)
            assert error(run[name, "dropout"].grads, alone.grads) < 1e-10, (name, where)
