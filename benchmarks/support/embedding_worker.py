r"""One rank of ``embedding.py``: steps of sparse optimisers on a sharded table, timed; see there."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partpar.exchange import meter
from partpar.sharded import DistEmbedding, SparseAdagrad, SparseAdam, Uniform
from partpar.training import tune_allocator

OPTIMISERS = {"adagrad": SparseAdagrad, "adam": SparseAdam}


class Model(torch.autograd.Function):
    r"""Stands for a model and its loss: a number whose gradient by the rows is known."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


def batches(case: dict[str, Any], rank: int) -> list[tuple[Tensor, Tensor]]:
    r"""Ids and gradients of some steps, used in turn."""
    draw = torch.Generator().manual_seed(rank)
    grads = [torch.randn(case["batch"], case["columns"], generator=draw) for _ in range(2)]
    return [(torch.randint(case["rows"], (case["batch"],), generator=draw), grads[i % 2]) for i in range(8)]


def train(name: str, case: dict[str, Any], rank: int) -> dict[str, Any]:
    r"""Seconds of each step of one optimiser; a step is looking rows up, a backward pass and the update."""
    table = DistEmbedding(case["rows"], case["columns"], name, Uniform(-0.01, 0.01))
    optimiser = OPTIMISERS[name]([table], lr=0.01)
    steps = batches(case, rank)
    seconds = []
    for number in range(case["warm"] + case["steps"]):
        ids, grad = steps[number % len(steps)]
        if number == case["warm"]:
            meter.reset()
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        Model.apply(table(ids), grad).backward()
        optimiser.step()
        seconds.append(time.perf_counter() - start)
    copies = 2 if name == "adagrad" else 3
    kept = table.weight.local_rows.numel() * 4 * copies
    return {
        "seconds": seconds[case["warm"] :],
        "exchange_seconds": meter.seconds / case["steps"],
        "bytes_sent": meter.bytes_sent / case["steps"],
        "kept": kept,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def local_bound(case: dict[str, Any]) -> dict[str, float]:
    r"""Seconds of a step that only fetches rows of a table of one's own and adds to them (``index_add``)."""
    table = torch.zeros(case["rows"] // case["ranks"], case["columns"])
    steps = [(ids % len(table), grad) for ids, grad in batches(case, 0)]
    seconds = []
    for number in range(case["warm"] + case["steps"]):
        ids, grad = steps[number % len(steps)]
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        table.index_select(0, ids)
        table.index_add_(0, ids, grad)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[case["warm"] :])}


def main() -> None:
    r"""Runs what the command line says and writes what it found."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    tune_allocator()  # as partpar.init does for every worker
    rank = int(os.environ.get("RANK", "0"))
    if "MASTER_PORT" in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo")
    told: dict[str, Any] = {name: train(name, case, rank) for name in case["optimisers"]}
    told["local"] = local_bound(case)
    Path(case["results"], f"{rank}.json").write_text(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
