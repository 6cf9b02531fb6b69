r"""A worker that trains for long and makes loader after loader, and tells what its process holds: after a warm-up of a
quarter as much, and at the end.

``growth.py FOLDER STEPS LOADERS [leaking]``; with the last word, it keeps what it should drop.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from partpar import GraphData, training
from partpar.nn import global_mean
from partpar.sampling import DistNeighborLoader


def held() -> dict[str, int]:
    r"""What this process holds. Shared memory: of its own, and of processes that are gone."""
    gc.collect()
    me = psutil.Process()
    mine = {me.pid, *(child.pid for child in me.children(recursive=True))}
    named = [re.findall(r"\d+", path.name) for path in Path("/dev/shm").iterdir()]  # torch_PID_... and the like
    shared = [int(numbers[0]) for numbers in named if numbers]
    shared = [pid for pid in shared if pid in mine or not psutil.pid_exists(pid)]
    counts = {"threads": me.num_threads(), "processes": len(mine), "file descriptors": me.num_fds(), "shared memory": len(shared)}
    return {**counts, "resident bytes": me.memory_info().rss}


class Run:
    r"""The steps and loaders of one worker.

    Args:
        leaking: Whether to keep all loaders' iterators, and 128 KiB of each step.
    """

    def __init__(self, share: GraphData, leaking: bool) -> None:
        self.share, self.kept = share, [] if leaking else None  # type: GraphData, list[Any] | None

    def keep(self, *things: Any) -> None:
        if self.kept is not None:
            self.kept += things

    def steps(self, loader: DistNeighborLoader, number: int) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 3)
        optimizer = torch.optim.Adam(model.parameters())
        done = 0
        while done < number:
            for batch in loader:
                out = model(batch.x[: batch.batch_size].float())
                loss = global_mean(F.cross_entropy(out, torch.zeros(len(out), dtype=torch.int64), reduction="none"))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.keep(torch.ones(1 << 15))
                done += 1

    def loaders(self, number: int) -> None:
        r"""Reads a batch of each. Every other one is closed, the rest dropped in the midst of an epoch; one of either has a
        process."""
        for count in range(number):
            loader = DistNeighborLoader(self.share, [3, 3], batch_size=4, num_workers=int(count in (4, 9)))
            batches = iter(loader)
            next(batches)
            self.keep(batches)
            if count % 2:
                loader.close()


def main() -> None:
    folder, steps, loaders = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with training.init(timeout=60, quiet=True, allocator=False) as worker:
        share = GraphData.load_partition(folder, worker.rank, worker.world_size, algorithm="random")
        run = Run(share, leaking="leaking" in sys.argv)
        for part in (4, 1):  # the first warms up
            with DistNeighborLoader(share, [3, 3], batch_size=4, shuffle=True) as loader:
                run.steps(loader, steps // part)
                run.loaders(loaders // part // 2)
            run.loaders(loaders // part - loaders // part // 2)  # where the service ends with its last loader
            time.sleep(0.5)
            print(json.dumps(held()), flush=True)


if __name__ == "__main__":
    main()
