r"""One contender of ``full_graph.py``, in processes of its own: trains some epochs and reports what they took.

``python benchmarks/support/contenders.py CASE_JSON`` is one rank of a case and writes its result to a file of the case's folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from safetensors.torch import load_file
from torch import Tensor

HEADS = 4
Result = dict[str, Any]


def memory(key: str) -> int:
    r"""A figure of this process from the kernel, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


AFTER_IMPORTS = memory("VmRSS")  # torch and PyG are there, nothing else


def model_arguments(
    model: str, num_features: int, hidden: int, num_classes: int
) -> tuple[str, dict[str, Any]]:
    r"""Class name and arguments, the same for PyG's model and ours."""
    layers = {"in_channels": num_features, "hidden_channels": hidden, "out_channels": num_classes}
    if model == "gat":
        return "GAT", layers | {"num_layers": 2, "heads": HEADS, "add_self_loops": False}
    return {"gcn": "GCN", "sage": "GraphSAGE"}[model], layers | {"num_layers": 3}


# --- one process and PyG --------------------------------------------------------------------------------------------


def pyg_epoch(case: dict[str, Any]) -> tuple[Callable[[], Tensor], torch.nn.Module, int]:
    r"""An epoch as PyG's user writes it, with normalised edges kept from the first one on."""
    torch.set_num_threads(case["threads"])
    graph = load_file(Path(case["folder"]) / "graph.safetensors")
    x, y, mask = graph["x"], graph["y"], graph["train_mask"]
    name, arguments = model_arguments(case["model"], x.size(1), case["hidden"], case["classes"])
    edges = graph["edge_index"]
    if case["edges"] == "adj_t":
        weight = None
        if name == "GCN":
            edges, weight = pyg_nn.conv.gcn_conv.gcn_norm(edges, num_nodes=x.size(0))
            arguments["normalize"] = False
        edges = to_adj_t(edges, weight, x.size(0))
    elif name == "GCN":
        arguments["cached"] = True
    del graph
    model = getattr(pyg_nn, name)(**arguments)
    model.load_state_dict(load_file(Path(case["folder"]) / f"{case['model']}.safetensors"))
    return training(model, lambda: F.cross_entropy(model(x, edges)[mask], y[mask])), model, x.size(0)


def to_adj_t(edge_index: Tensor, weight: Tensor | None, num_nodes: int) -> Tensor:
    r"""The transposed adjacency as ``torch.sparse_csr``, as PyG's layers take it for ``edge_index``."""
    if weight is None:
        weight = torch.ones(edge_index.size(1))
    order = edge_index[1].argsort(stable=True)
    indptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    indptr[1:] = edge_index[1].bincount(minlength=num_nodes).cumsum(0)
    return torch.sparse_csr_tensor(indptr, edge_index[0][order], weight[order], (num_nodes, num_nodes))


def training(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    r"""An epoch: forwards, backwards, Adam's step; returns the loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def epoch() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return epoch


# --- partpar --------------------------------------------------------------------------------------------------------


@contextmanager
def partpar_epoch(case: dict[str, Any]) -> Iterator[tuple[Callable[[], Tensor], torch.nn.Module, int]]:
    r"""An epoch as our own user writes it."""
    import partpar.models

    from partpar import GraphData
    from partpar.nn import global_mean, keep_halo
    from partpar.training import init

    with init(threads=case["threads"], allocator=case["tuned"], quiet=True) as worker:
        share = GraphData.load_partition(case["folder"], worker.rank, worker.world_size)
        route, adj = share.to_route(), share.adj()
        owned = share.node("dst")
        y, mask = owned["y"], owned["train_mask"]
        x = keep_halo(owned["x"], route) if case["keep_halo"] else owned["x"].clone()
        name, arguments = model_arguments(case["model"], owned["x"].size(1), case["hidden"], case["classes"])
        if name == "GCN":
            arguments["cached"] = True
        if case["recompute"]:
            arguments["recompute"] = True
        inner = getattr(partpar.models, name)(**arguments)
        inner.load_state_dict(load_file(Path(case["folder"]) / f"{case['model']}.safetensors"))
        model = inner if worker.group is None else torch.nn.parallel.DistributedDataParallel(inner)

        def loss_of() -> Tensor:
            out = model(x, adj, route)
            return global_mean(F.cross_entropy(out[mask], y[mask], reduction="none"), route=route)

        yield training(model, loss_of), inner, share.num_owned()


# --- both -----------------------------------------------------------------------------------------------------------


def measure(
    epoch: Callable[[], Tensor], model: torch.nn.Module, num_rows: int, case: dict[str, Any]
) -> Result:
    r"""Runs warm-up epochs and timed ones."""
    losses: list[float] = []
    seconds: list[float] = []
    gradient: list[float] = []
    traffic = watch = None
    if case["who"] == "partpar":
        from partpar.exchange import meter
        from partpar.training.network import SimulatedNetwork

        watch = SimulatedNetwork(case.get("gbit"), case.get("latency", 0.0))
        traffic = watch.traffic
        watch.__enter__()
    for number in range(case["warm"] + case["epochs"]):
        if number == case["warm"] and traffic is not None:
            traffic.reset()
            meter.reset()
        start = time.perf_counter()
        losses.append(epoch().item())
        seconds.append(time.perf_counter() - start)
        if not gradient:
            gradient = [float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None]
    spent = sum(seconds[case["warm"] :])
    result: Result = {
        "seconds": seconds[case["warm"] :],
        "losses": losses,
        "peak": memory("VmHWM") - AFTER_IMPORTS,
        "gradient": gradient,
    }
    if watch is not None and traffic is not None:
        watch.__exit__(None, None, None)
        result["visible"] = meter.seconds / spent
        result["hidden"] = traffic.hidden_seconds / spent
        result["bytes_sent"] = traffic.bytes_sent / case["epochs"]
    if case["model"] == "sage":
        result["dense"] = dense_seconds(model, num_rows, case["epochs"])
    return result


def dense_seconds(model: torch.nn.Module, num_rows: int, epochs: int) -> float:
    r"""Median time of an epoch's linear maps alone, forwards and backwards, on as many rows as this process owns."""
    linears = [m for m in model.modules() if isinstance(m, pyg_nn.Linear)]
    inputs = [torch.randn(num_rows, m.in_channels, requires_grad=True) for m in linears]
    grads = {m.out_channels: torch.randn(num_rows, m.out_channels) for m in linears}
    # Nobody asks for the gradient of the first layer's input, the features.
    wanted = [
        [*m.parameters(), *([] if i < 2 else [x])]
        for i, (m, x) in enumerate(zip(linears, inputs, strict=True))
    ]
    seconds = []
    for _ in range(epochs + 2):
        start = time.perf_counter()
        for linear, x, wants in zip(linears, inputs, wanted, strict=True):
            torch.autograd.grad(linear(x), wants, grads[linear.out_channels])
        seconds.append(time.perf_counter() - start)
    return float(torch.tensor(seconds[2:]).median())


def main() -> None:
    r"""Runs one rank."""
    case = json.loads(sys.argv[1])
    if case["who"] == "pyg":
        result = measure(*pyg_epoch(case), case)
    else:
        with partpar_epoch(case) as made:
            result = measure(*made, case)
    Path(case["results"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
