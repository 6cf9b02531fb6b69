r"""One contender of ``hetero.py``, in processes of its own; ``python benchmarks/support/hetero_worker.py CASE_JSON`` is one
rank and writes its result to a file of the case's folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from contenders import measure, training
from torch import Tensor
from torch_geometric.data import HeteroData

from partpar.graph.arrays import to_pyg

TARGET = "paper"


class JoinedRGCN(torch.nn.Module):
    r"""PyG's own: the typed graph as one of one type."""

    def __init__(self, sizes: tuple[int, int, int], num_relations: int) -> None:
        super().__init__()
        features, hidden, classes = sizes
        self.first = pyg_nn.RGCNConv(features, hidden, num_relations)
        self.second = pyg_nn.RGCNConv(hidden, hidden, num_relations)
        self.head = torch.nn.Linear(hidden, classes)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor, rows: slice) -> Tensor:
        x = F.relu(self.first(x, edge_index, edge_type))
        return self.head(self.second(x, edge_index, edge_type)[rows])


class RoutedRGCN(torch.nn.Module):
    r"""The same over a share."""

    def __init__(self, sizes: tuple[int, int, int], edge_types: list[Any]) -> None:
        from partpar.nn import RGCNConv

        super().__init__()
        features, hidden, classes = sizes
        self.first = RGCNConv(features, hidden, edge_types)
        self.second = RGCNConv(hidden, hidden, edge_types)
        self.head = torch.nn.Linear(hidden, classes)

    def forward(self, x: Any, edges: Any, route: Any) -> Tensor:
        hidden = {t: F.relu(rows) for t, rows in self.first(x, edges, route).items()}
        return self.head(self.second(hidden, edges, route)[TARGET])


def load(case: dict[str, Any]) -> HeteroData:
    r"""The generated graph, its relations in the order that numbers them."""
    path = Path(case["folder"], "graph")
    stored = to_pyg({file.stem: np.load(file) for file in path.glob("*.npy")})
    data = HeteroData()
    for t in stored.node_types:
        data[t].update(stored[t])
    for edge_type in case["edge_types"]:
        data[edge_type].edge_index = stored[edge_type].edge_index
    return data


def pyg_epoch(case: dict[str, Any]) -> tuple[Callable[[], Tensor], torch.nn.Module, int]:
    r"""An epoch as PyG's user writes it."""
    torch.set_num_threads(case["threads"])
    data = load(case)
    y, mask = data[TARGET].y, data[TARGET].train_mask
    first = data.node_types.index(TARGET)
    start = sum(data[t].num_nodes for t in data.node_types[:first])
    rows = slice(start, start + data[TARGET].num_nodes)
    num_relations = len(data.edge_types)
    for t in data.node_types:
        for name in [name for name in data[t] if name != "x"]:
            del data[t][name]
    joined = data.to_homogeneous()
    x, edges, number = joined.x, joined.edge_index, joined.edge_type
    del data, joined
    torch.manual_seed(0)
    model = JoinedRGCN(case["sizes"], num_relations)
    return (
        training(model, lambda: F.cross_entropy(model(x, edges, number, rows)[mask], y[mask])),
        model,
        x.size(0),
    )


@contextmanager
def partpar_epoch(case: dict[str, Any]) -> Iterator[tuple[Callable[[], Tensor], torch.nn.Module, int]]:
    r"""An epoch as our user writes it."""
    from partpar import GraphData
    from partpar.nn import global_mean, keep_halos
    from partpar.training import init

    with init(threads=case["threads"], quiet=True) as worker:
        share = GraphData.load_partition(case["folder"], worker.rank, worker.world_size)
        route, edges, owned = share.to_route(), share.adj_dict(), share.node(TARGET)
        y, mask = owned["y"], owned["train_mask"]
        x: Any = share.collect("x")
        x = keep_halos(x, route) if case["keep_halo"] else {t: rows.clone() for t, rows in x.items()}
        torch.manual_seed(0)
        inner = RoutedRGCN(case["sizes"], case["edge_types"])
        model = inner if worker.group is None else torch.nn.parallel.DistributedDataParallel(inner)

        def loss_of() -> Tensor:
            out = model(x, edges, route)
            return global_mean(F.cross_entropy(out[mask], y[mask], reduction="none"), route=route)

        yield training(model, loss_of), inner, share.num_owned(TARGET)


def main() -> None:
    r"""Runs one rank."""
    case = json.loads(sys.argv[1])
    case["edge_types"] = [tuple(edge_type) for edge_type in case["edge_types"]]
    if case["who"] == "pyg":
        if case["blocks"] == "kept":
            from partpar.training.machine import tune_allocator

            assert tune_allocator()
        result = measure(*pyg_epoch(case), case)
    else:
        with partpar_epoch(case) as made:
            result = measure(*made, case)
    Path(case["results"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
