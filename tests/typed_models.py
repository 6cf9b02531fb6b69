r"""Models of typed graphs, of PyG's classes in one process and of ours on a share, and their training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Worker
from graphs import npz_path, typed_graph
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import HeteroData

from partpar import GraphData, HeteroRoute, nn
from partpar.exchange import all_reduce_sum
from partpar.nn import global_mean

NAMES = ("rgcn", "bases", "blocks", "sage", "mixed", "hgt", "han", "to_hetero")
LAYERS = ("rgcn", "sage", "hgt", "han")
HIDDEN = 8


class Task(NamedTuple):
    r"""A graph, the type whose nodes are classified, and the number of classes."""

    data: HeteroData
    target: str
    classes: int


@functools.cache
def load(graph: str) -> Task:
    if graph == "generated":
        return Task(typed_graph(), "a", 3)
    with np.load(npz_path("dblp_hetero"), allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "biuf"}
    data, draw = HeteroData(), torch.Generator().manual_seed(0)
    for t in ("author", "conf", "paper", "term"):
        size = int(arrays[f"num_nodes__{t}"])
        data[t].x = torch.randn(size, 8, generator=draw, dtype=torch.float64)
        if f"x__{t}_indptr" in arrays:  # counts of words: their mean in a few random directions
            indptr, indices, values = (arrays[f"x__{t}_{piece}"] for piece in ("indptr", "indices", "data"))
            rows = torch.repeat_interleave(torch.arange(size), indptr.diff())
            directions = torch.randn(int(indices.max()) + 1, 8, generator=draw, dtype=torch.float64)
            sums = torch.zeros(size, 8, dtype=torch.float64)
            sums.index_add_(0, rows, directions[indices] * values.unsqueeze(1))
            data[t].x = sums / indptr.diff().clamp(min=1).unsqueeze(1) * 4
    data["author"].y, data["author"].train_mask = arrays["y__author"], arrays["train_mask__author"]
    for name, edges in arrays.items():
        if name.startswith("edge_index__"):
            source, relation, destination = name.split("__")[1:]
            data[source, relation, destination].edge_index = edges
            data[destination, f"rev_{relation}", source].edge_index = edges.flip(0)
    return Task(data, "author", 4)


class Layers(torch.nn.Module):
    r"""Two layers over all types, then a linear map of the target's rows."""

    def __init__(self, make: Callable[[], torch.nn.Module], task: Task) -> None:
        super().__init__()
        self.first, self.second = make(), make()
        self.head = torch.nn.Linear(HIDDEN, task.classes)
        self.target = task.target

    def forward(self, x: Any, edges: Any, **route: Any) -> Tensor:
        hidden = {t: rows.relu() for t, rows in self.first(x, edges, **route).items() if rows is not None}
        return self.head(self.second(hidden, edges, **route)[self.target])


class Joined(torch.nn.Module):
    r"""PyG's RGCN takes a typed graph as one of one type."""

    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: dict[str, Tensor], edges: dict[Any, Tensor]) -> dict[str, Tensor]:
        sizes = [rows.size(0) for rows in x.values()]
        first = dict(zip(x, [0, *torch.tensor(sizes).cumsum(0).tolist()], strict=False))
        shifted = [e + torch.tensor([[first[s]], [first[d]]]) for (s, _, d), e in edges.items()]
        number = torch.cat([torch.full((e.size(1),), i) for i, e in enumerate(shifted)])
        out = self.conv(torch.cat(list(x.values())), torch.cat(shifted, 1), number)
        return dict(zip(x, out.split(sizes), strict=True))


class Plain(torch.nn.Module):
    r"""A model of one type as a user writes it, for ``to_hetero``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = pyg.SAGEConv((8, 8), HIDDEN), pyg.BatchNorm(HIDDEN)
        self.second = pyg.GATConv((HIDDEN, HIDDEN), HIDDEN, heads=2, concat=False, add_self_loops=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x, edge_index)).relu(), edge_index)


class ToHetero(torch.nn.Module):
    def __init__(self, task: Task, route: bool) -> None:
        super().__init__()
        self.inner = pyg.to_hetero(Plain(), task.data.metadata())
        self.inner = nn.route_model(self.inner) if route else self.inner
        self.head, self.target = torch.nn.Linear(HIDDEN, task.classes), task.target

    def forward(self, x: Any, edges: Any, **route: Any) -> Tensor:
        return self.head(self.inner(x, edges, **route)[self.target])


def convolutions(task: Task) -> dict[Any, torch.nn.Module]:
    r"""A different kind of PyG's for each relation."""
    makers = (
        lambda: pyg.GATConv((8, 8), HIDDEN, add_self_loops=False),
        lambda: pyg.GINConv(torch.nn.Linear(8, HIDDEN)),
        lambda: pyg.SAGEConv((8, 8), HIDDEN, aggr="max"),
        lambda: pyg.GATv2Conv((8, 8), HIDDEN, add_self_loops=False),
        lambda: pyg.TransformerConv((8, 8), HIDDEN),
        lambda: pyg.GraphConv((8, 8), HIDDEN),
    )
    return {e: makers[i % len(makers)]() for i, e in enumerate(task.data.edge_types)}


def build(task: Task, ours: bool, names: tuple[str, ...] = NAMES) -> torch.nn.ModuleDict:
    r"""All models, of PyG's classes or ours, with the same first weights."""
    types, meta = task.data.edge_types, task.data.metadata()
    zoo: Any = nn if ours else pyg

    def rgcn(**options: Any) -> torch.nn.Module:
        if ours:
            return nn.RGCNConv(8, HIDDEN, types, **options)
        return Joined(pyg.RGCNConv(8, HIDDEN, len(types), **options))

    def sage() -> torch.nn.Module:
        if ours:
            return nn.HeteroSAGEConv(8, HIDDEN, types)
        return pyg.HeteroConv({e: pyg.SAGEConv((8, 8), HIDDEN) for e in types})

    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "rgcn": rgcn,
        "bases": lambda: rgcn(num_bases=2, aggr="sum", root_weight=False),
        "blocks": lambda: rgcn(num_blocks=2, aggr="max"),
        "sage": sage,
        "mixed": lambda: zoo.HeteroConv(convolutions(task), aggr="mean"),
        "hgt": lambda: zoo.HGTConv(8, HIDDEN, meta, heads=2),
        "han": lambda: zoo.HANConv(8, HIDDEN, meta, heads=2),
    }
    built = {}
    for name in names:
        torch.manual_seed(1)
        built[name] = ToHetero(task, ours) if name == "to_hetero" else Layers(makers[name], task)
    return torch.nn.ModuleDict(built).double()


class Losses(torch.nn.Module):
    r"""The loss of each model, ``[models]``: one pass of :class:`DistributedDataParallel` serves all."""

    def __init__(self, built: torch.nn.ModuleDict, loss_of: Callable[[torch.nn.Module], Tensor]) -> None:
        super().__init__()
        self.built, self.loss_of = built, loss_of

    def forward(self) -> Tensor:
        return torch.stack([self.loss_of(model) for model in self.built.values()])


Runs = dict[str, tuple[Tensor, Tensor, Tensor]]


def train(losses_of: torch.nn.Module, built: torch.nn.ModuleDict, steps: int) -> Runs:
    r"""Losses ``[steps]``, gradients ``[steps, parameters]`` and final weights of each model; a parameter that nothing
    depends on has the gradient 0."""
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
    losses, grads = [], {name: [] for name in built}
    for _ in range(steps):
        optimizer.zero_grad()
        values = losses_of()
        values.sum().backward()
        losses.append(values.detach())
        for name, model in built.items():
            flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
            grads[name].append(torch.cat(flat))
        optimizer.step()
    weights = {n: torch.cat([p.detach().flatten() for p in m.parameters()]) for n, m in built.items()}
    by_model = torch.stack(losses).unbind(1)
    return {n: (by_model[i], torch.stack(grads[n]), weights[n]) for i, n in enumerate(built)}


def errors(found: Runs, expected: Runs) -> dict[tuple[str, str], float]:
    return {
        (name, what): float(((a - b).abs() / b.abs().clamp(min=1)).max())
        for name in found
        for what, a, b in zip(("losses", "gradients", "parameters"), found[name], expected[name], strict=True)
    }


@functools.cache
def reference(graph: str, steps: int, names: tuple[str, ...] = NAMES) -> Runs:
    task = load(graph)
    mask, y = task.data[task.target].train_mask, task.data[task.target].y
    x, edges = task.data.collect("x"), task.data.collect("edge_index")
    built = build(task, ours=False, names=names)
    return train(Losses(built, lambda model: F.cross_entropy(model(x, edges)[mask], y[mask])), built, steps)


def same_weights(task: Task, names: tuple[str, ...]) -> torch.nn.ModuleDict:
    built, theirs = build(task, ours=True, names=names), build(task, ours=False, names=names)
    pairs = zip(built.state_dict().items(), theirs.state_dict().values(), strict=True)
    built.load_state_dict({key: value.clone() for (key, _), value in pairs})
    return built


def worker_case(
    worker: Worker, root: Path, graph: str, algorithm: str, way: str, steps: int, names: tuple[str, ...] = NAMES
) -> Runs:
    r"""Trains all models through DDP on this worker's share."""
    warnings.simplefilter("ignore")
    task = load(graph)
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    route = share.to_route(worker.group)
    owned = share.node(task.target)
    x = share.collect("x")
    rows = nn.keep_halos(x, route) if way == "kept" else x
    edges = share.edge_index_dict() if way == "edge_index" else share.adj_dict()
    built = same_weights(task, names)

    def loss_of(model: torch.nn.Module) -> Tensor:
        out = model(x if isinstance(model, ToHetero) else rows, edges, route=route)
        return global_mean(F.cross_entropy(out, owned["y"], reduction="none"), owned["train_mask"], route)

    losses = Losses(built, loss_of)
    set_aside_unused(losses, route)
    parallel = DistributedDataParallel(losses, process_group=worker.group, broadcast_buffers=False)
    return train(parallel, built, steps)


def set_aside_unused(losses: Losses, route: HeteroRoute) -> None:
    r"""Parameters that nothing depends on, which are the same on every rank, whatever is in its part: DDP waits for the
    others."""
    losses().sum().backward()
    used = torch.tensor([p.grad is not None for p in losses.parameters()])
    by_ranks = all_reduce_sum(used.long(), route.group)
    assert torch.equal(by_ranks, used * route.world_size), "a rank leaves parameters out that others use"
    for parameter, wanted in zip(losses.parameters(), used.tolist(), strict=True):
        parameter.requires_grad_(wanted)
        parameter.grad = None
