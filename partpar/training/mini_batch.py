r"""What training on sampled batches has in common: an epoch, its sums over all workers, and the numbers of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar.training.together import all_numbers


@dataclass(frozen=True)
class BatchEpoch:
    r"""What an epoch over batches did, over all workers.

    Args:
        loss: Mean over all seeds.
        seeds: How many there were.
        seconds: Of the slowest worker.
        phase_seconds: Time of each rank waiting for batches, and computing steps with their gradients' exchange.
    """

    loss: float
    seeds: int
    seconds: float
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)


def train_epoch(
    loader: Iterable[Any],
    loss_of: Callable[[Any], tuple[Tensor, int]],
    optimizer: torch.optim.Optimizer,
    group: ProcessGroup | None = None,
) -> BatchEpoch:
    r"""A step for each batch of a loader (collective).

    Args:
        loader: Yields as many batches on every rank.
        loss_of: The loss of a batch, a mean, and over how many seeds.
        optimizer: Of the parameters.
        group: The process group; :obj:`None` when alone.
    """
    start, total, seeds, computing = time.perf_counter(), 0.0, 0, 0.0
    for batch in loader:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss, count = loss_of(batch)
        loss.backward()
        optimizer.step()
        total, seeds = total + loss.item() * count, seeds + count
        computing += time.perf_counter() - begin
    table = all_numbers([total, seeds, time.perf_counter() - start, computing], group)
    mean = float(table[:, 0].sum() / table[:, 1].sum().clamp(min=1))
    phases = {"batches": (table[:, 2] - table[:, 3]).tolist(), "compute": table[:, 3].tolist()}
    return BatchEpoch(mean, int(table[:, 1].sum()), float(table[:, 2].max()), phases)
