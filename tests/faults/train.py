r"""A worker that trains: on the full graph, on mini-batches of sampled neighbours, and with rows of a sharded tensor.

``train.py HOW FOLDER [STEPS] [TIMEOUT]`` with HOW one of ``full``, ``saves`` (the same, with a checkpoint of each step),
``batches``, ``tensor``, or several, such as ``full+tensor``, one after the other. The graph is drawn, so that nothing needs
to lie on disk but the partition.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from graphs import directed_graph
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, Route, training
from partpar.nn import global_mean
from partpar.sampling import DistNeighborLoader
from partpar.sharded import DistTensor


class Layer(torch.nn.Module):
    r"""A user's layer: sums over in-edges, then a linear map."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(channels, out_channels, dtype=torch.float64)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, route: Route) -> torch.Tensor:
        source, destination = edge_index
        sums = torch.zeros_like(x).index_add(0, destination, route.apply(x)[source])
        return F.relu(self.lin(x + sums))


class Net(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(channels, 8), Layer(8, 3)])

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, route: Route) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, edge_index, route)
        return x


def full(worker: training.Context, share: GraphData, steps: int, save: Callable[..., object] = lambda *_: None) -> None:
    route, owned = share.to_route(), share.node("dst")
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(owned["x"].size(1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        out = model(owned["x"].double(), share.edge_index(), route)
        loss = global_mean(F.cross_entropy(out, owned["raw_ids"] % 3, reduction="none"), route=route)
        loss.backward()
        optimizer.step()
        save(step + 1, model)
        print(f"step {step} loss {float(loss):.12g}", flush=True)


def saves(worker: training.Context, share: GraphData, steps: int, folder: str, timeout: float) -> None:
    with training.Checkpointer(folder, group=worker.group, timeout=timeout, asynchronous=False) as kept:
        full(worker, share, steps, lambda step, model: kept.save(step, **model.module.state_dict()))


def batches(worker: training.Context, share: GraphData, steps: int, timeout: float) -> None:
    loader = DistNeighborLoader(share, [3, 3], None, batch_size=4, shuffle=True, timeout=timeout)
    torch.manual_seed(0)
    model = torch.nn.Linear(share.node("dst")["x"].size(1), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    done = 0
    with loader:
        while done < steps:
            for batch in loader:
                out = model(batch.x[: batch.batch_size].float())
                loss = global_mean(F.cross_entropy(out, torch.zeros(out.size(0), dtype=torch.int64), reduction="none"))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                print(f"step {done} loss {float(loss):.12g}", flush=True)
                done += 1


def tensor(worker: training.Context, share: GraphData, steps: int) -> None:
    table = DistTensor((60, 4), torch.float64, "table")
    for step in range(steps):
        ids = (torch.arange(20) * (worker.rank + 1) + step) % 60
        table[ids] = table[ids] + 1
        print(f"step {step} sum {float(table[torch.arange(60)].sum()):.12g}", flush=True)


def main() -> None:
    how, folder = sys.argv[1:3]
    steps, timeout = int((sys.argv[3:] or ["20"])[0]), float((sys.argv[4:] or ["20"])[0])
    with training.init(timeout=timeout, quiet=True, allocator=False) as worker:
        graph = GraphData.from_pyg_data(directed_graph())
        parts = worker.world_size
        training.first_rank(lambda: graph.partition_graph(folder, parts, algorithm="random") and None, worker.group)
        share = GraphData.load_partition(folder, worker.rank, parts, algorithm="random")
        for kind in how.split("+"):
            if kind == "batches":
                batches(worker, share, steps, timeout)
            elif kind == "saves":
                saves(worker, share, steps, f"{folder}/checkpoints", timeout)
            else:
                {"full": full, "tensor": tensor}[kind](worker, share, steps)
    print("ended well", flush=True)


if __name__ == "__main__":
    main()
