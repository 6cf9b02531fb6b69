r"""One rank of the ping of ``partpar doctor``: whether all ranks reach each other over a backend, and how fast.

Its arguments are the backend, the seconds to wait and, if wanted, a file for what rank 0 found, else it is printed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from partpar import training
from partpar.errors import ServiceError
from partpar.serving import agent
from partpar.serving.remote import RpcTransport
from partpar.serving.transport import Verbs

RPC = "rpc"  # the remote service, which starts over gloo
_ROUNDS = 20
_BYTES = 8 << 20


def main(backend: str, timeout: float, result: Path | None) -> None:
    r"""Sends rows from every rank to every other, over ``"gloo"``, ``"nccl"`` or the remote service."""
    device = "cuda" if backend == "nccl" else "cpu"
    with training.init(device, "gloo" if backend == RPC else backend, timeout, quiet=True) as worker:
        if backend == RPC:
            found = {"ms": _questions(worker.rank, worker.world_size, timeout)}
        else:
            found = _exchanges(worker.rank, worker.world_size, worker.device)
        if worker.is_first:
            line = json.dumps({"backend": backend, "ranks": worker.world_size, **found})
            if result is None:
                print(line)
            else:
                result.write_text(line)


def _exchanges(rank: int, size: int, device: torch.device) -> dict[str, float]:
    r"""Milliseconds of a small exchange, and GB/s that a rank sends in a large one."""
    small = torch.full((size,), float(rank), device=device)
    got = torch.empty_like(small)
    dist.all_to_all_single(got, small)
    if got.tolist() != [float(other) for other in range(size)]:
        raise ServiceError(f"expected the numbers of ranks 0 to {size - 1}, found {got.tolist()}")
    large = torch.zeros(_BYTES // 4 // size * size, device=device)
    into = torch.empty_like(large)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    latency = _median(lambda: dist.all_to_all_single(got, small), wait)
    busy = _median(lambda: dist.all_to_all_single(into, large), wait)
    return {"ms": 1e3 * latency, "GB/s": large.nbytes * (size - 1) / size / busy / 1e9}


def _questions(rank: int, size: int, timeout: float) -> float:
    r"""Milliseconds of a question to another rank and its answer."""
    verbs = Verbs()
    verbs.register("echo", lambda tensors, values: tensors)
    agent.offer("ping", verbs)
    agent.start_in_default_group(timeout, agent.MIN_THREADS)
    transport = RpcTransport("ping", [[agent.worker_name(other)] for other in range(size)], timeout)
    number = torch.tensor([rank])

    def ask_all() -> None:
        questions = [
            transport.begin(other, "echo", {"number": number}) for other in range(size) if other != rank
        ]
        for question in questions:
            if int(question.wait()["number"]) != rank:
                raise ServiceError(f"expected the answer {rank}, found another")

    median = _median(ask_all, lambda: None)
    agent.stop(wait=agent.withdraw("ping"))
    return 1e3 * median


def _median(step: Callable[[], object], wait: Callable[[], None]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
