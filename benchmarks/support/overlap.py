r"""One rank of ``network.py``: how well the exchange hides behind the interior, on a simulated network.

``python benchmarks/support/overlap.py CASE_JSON`` writes its result to a file of the case's folder.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partpar.models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from partpar import GraphData
from partpar.nn import global_mean, keep_halo
from partpar.nn.neighbour_sum import NeighbourSum, plan_sum
from partpar.training import init
from partpar.training.network import SimulatedNetwork


def together(work: Callable[[], object]) -> float:
    r"""Seconds of a call that all ranks enter at once."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pieces(plan: NeighbourSum, width: int) -> dict[str, Callable[[], object]]:
    r"""A sum over in-neighbours forwards and backwards, and what it is made of: each alone."""
    owned, index = plan.route.num_owned, plan.route.send_index
    x, grad = torch.randn(owned, width, requires_grad=True), torch.randn(owned, width)
    received = torch.randn(sum(plan.blocks.recv_splits), width, requires_grad=True)
    out, sent = torch.zeros(owned, width), torch.randn(sum(plan.blocks.send_splits), width)

    def exchange() -> None:
        there = plan.blocks.begin(sent).wait()
        plan.blocks.back().begin(there).wait()

    def interior() -> None:
        torch.autograd.grad(plan.own.sum(x), x, grad)

    def boundary() -> None:
        slots = x.index_select(0, index) if plan.send is None else plan.send.sum(x)
        torch.autograd.grad(plan.halo.sum(received, out.clone()), received, grad)
        torch.autograd.grad(slots, x, sent)

    def step() -> None:
        torch.autograd.grad(plan(x), x, grad)

    return {"exchange": exchange, "interior": interior, "boundary": boundary, "step": step}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    r"""Without the first of each, which warms up."""
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    r"""Times sums and epochs with and without the network, in turns."""
    with init(threads=1, quiet=True) as worker:
        share = GraphData.load_partition(case["folder"], worker.rank, worker.world_size)
        route, adj, owned = share.to_route(), share.adj(), share.node("dst")
        x = keep_halo(owned["x"], route)
        sizes = {
            "in_channels": x.owned.size(1),
            "hidden_channels": case["hidden"],
            "out_channels": case["classes"],
        }
        inner = partpar.models.GCN(num_layers=3, cached=True, **sizes)
        inner.load_state_dict(load_file(Path(case["folder"]) / "gcn.safetensors"))
        model = torch.nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

        def loss_of(out: Tensor) -> Tensor:
            per_row = F.cross_entropy(
                out[owned["train_mask"]], owned["y"][owned["train_mask"]], reduction="none"
            )
            return global_mean(per_row, route=route)

        def epoch() -> None:
            optimizer.zero_grad()
            loss_of(model(x, adj, route)).backward()
            optimizer.step()

        widths = [case["hidden"], min(case["hidden"], case["classes"])]  # what layers 2 and 3 send
        plan = plan_sum(adj, route)
        predicted = sum(
            (sum(plan.bytes_per_peer(width)) + sum(plan.blocks.recv_splits) * width * 4) for width in widths
        )
        for _ in range(3):
            epoch()
        with SimulatedNetwork() as watch:
            epoch()
            counted = watch.traffic.bytes_sent
            watch.traffic.reset()
            inner.convs[0](x, adj, route).sum().backward()
            of_first_layer = watch.traffic.exchanges

        times: dict[str, dict[str, list[float]]] = {str(width): {} for width in widths}
        epochs: dict[str, list[float]] = {"unlimited": [], "limited": []}
        network = SimulatedNetwork(case["gbit"], case["latency"])
        calls = {str(width): pieces(plan, width) for width in widths}
        for _ in range(case["rounds"] + 1):
            for width, parts in calls.items():
                for name, call in parts.items():
                    with network:
                        times[width].setdefault(name, []).append(together(call))
            epochs["unlimited"].append(together(epoch))
            with network:
                epochs["limited"].append(together(epoch))
        on_wire = sum(
            network.seconds(plan_bytes(plan, width)) + case["latency"] for width in widths for _ in range(2)
        )
        return {
            "sums": {width: medians(taken) for width, taken in times.items()},
            "epochs": medians(epochs),
            "exchange": on_wire,
            "bytes": [counted, predicted],
            "exchanges_of_first_layer": of_first_layer,
        }


def plan_bytes(plan: NeighbourSum, width: int) -> int:
    r"""Bytes of one exchange in the direction that has more of them."""
    return max(sum(plan.blocks.send_splits), sum(plan.blocks.recv_splits)) * width * 4


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    Path(told["results"], f"{os.environ['RANK']}.json").write_text(json.dumps(measure(told)))
