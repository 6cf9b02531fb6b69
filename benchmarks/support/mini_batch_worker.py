r"""One rank of a case of ``mini_batch.py``: samples, fetches and trains, and writes what it took to a file of the case's folder."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from partpar.models import GraphSAGE
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, training
from partpar.sampling import DistNeighborLoader, blocks
from partpar.serving import remote


def memory(key: str) -> float:
    r"""A figure of this process from the kernel, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def mapped(suffix: str) -> float:
    r"""MiB of pages of mapped files of a kind that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(":")[0].isalpha() and "-" in line.split()[0]:
            inside = line.endswith(suffix)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total / 1024


def calibrate() -> dict[str, float]:
    r"""How fast the machine is right now: a matrix product in GFLOP/s, and a gather of rows in million rows/s."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 512, generator=draw)
    table = torch.randn(50_000, 100, generator=draw)
    rows = torch.randint(50_000, (25_000,), generator=draw)
    product = fastest(lambda: a @ b)
    gather = fastest(lambda: table.index_select(0, rows))
    return {"gflops": 2 * 512**3 / product / 1e9, "million_rows_per_s": 0.025 / gather}


def fastest(work: Callable[[], Any], times: int = 7) -> float:
    r"""Seconds of the fastest of some runs."""
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Traffic:
    r"""Counts the bytes of tensors that are asked for and answered."""

    def __init__(self) -> None:
        self.bytes = 0
        ask, result = remote.RpcTransport._ask, remote._Answer.wait

        def counting_ask(transport: Any, part: int, name: str, verb: str, tensors: Any, values: Any) -> Any:
            self.bytes += sum(tensor.nbytes for tensor in tensors.values())
            return ask(transport, part, name, verb, tensors, values)

        def counting_wait(answer: Any) -> Any:
            tensors = result(answer)
            self.bytes += sum(tensor.nbytes for tensor in tensors.values())
            return tensors

        remote.RpcTransport._ask = counting_ask  # type: ignore[method-assign]
        remote._Answer.wait = counting_wait  # type: ignore[method-assign]


def epochs(count: int, warm: int, epoch: Callable[[], None], together: bool) -> list[float]:
    r"""Seconds of each epoch, from when all ranks begin to when all are through."""
    seconds = []
    for number in range(warm + count):
        if together:
            dist.barrier()
        start = time.perf_counter()
        epoch()
        if together:
            dist.barrier()
        if number >= warm:
            seconds.append(time.perf_counter() - start)
    return seconds


def through(batches: Iterable[Any]) -> None:
    r"""Reads all batches."""
    for _ in batches:
        pass


def run(case: dict[str, Any]) -> dict[str, Any]:
    r"""The measures of this rank."""
    worker = training.init(threads=case["threads"], quiet=True)
    together = worker.world_size > 1
    share = GraphData.load_partition(case["root"], worker.rank, worker.world_size)
    traffic = Traffic()
    loader = DistNeighborLoader(
        share,
        case["fanouts"],
        share.node()["train_mask"],
        batch_size=case["batch_size"],
        shuffle=True,
        concurrency=case["concurrency"],
        attributes=["x", "y"],
    )
    batch = next(iter(loader))
    out: dict[str, Any] = {"first_batch_s": time.time() - case["started"], "seeds": loader.count}
    torch.manual_seed(0)
    model: torch.nn.Module = GraphSAGE(batch.x.size(1), case["hidden"], len(case["fanouts"]), case["classes"])
    if together:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, fused=True)

    def train() -> None:
        for batch in loader:
            optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(model(batch.x, blocks(batch)), batch.y[: batch.batch_size])
            loss.backward()
            optimizer.step()
        out["loss"] = loss.item()

    calibration = calibrate()
    measures: dict[str, Callable[[], None]] = {
        "training": train,
        "features": lambda: through(loader),
        "sampling": lambda: through(map(loader._maker.sample, loader.tasks(0))),
    }
    for name in case["measures"]:
        traffic.bytes = 0
        out[name] = epochs(case["epochs"], case["warm"], measures[name], together)
        out[f"{name}_bytes"] = traffic.bytes / (case["epochs"] + case["warm"])
    out["calibration"] = [calibration, calibrate()]
    out["peak_mib"], out["mapped_mib"] = memory("VmHWM"), mapped(".safetensors")
    out["cache"] = {"/".join(key): row for key, row in loader.service.cache_report().items()}
    loader.close()
    worker.close()
    return out


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    result = run(told)
    Path(told["results"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
