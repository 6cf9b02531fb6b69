r"""What training on sampled batches has in common: an epoch, its sums over all workers, and the numbers of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """

    loss: float
    seeds: int
    seconds: float


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
    start, total, seeds = time.perf_counter(), 0.0, 0
    for batch in loader:
        optimizer.zero_grad()
        loss, count = loss_of(batch)
        loss.backward()
        optimizer.step()
        total, seeds = total + loss.item() * count, seeds + count
    table = all_numbers([total, seeds, time.perf_counter() - start], group)
    return BatchEpoch(float(table[:, 0].sum() / table[:, 1].sum().clamp(min=1)), int(table[:, 1].sum()), float(table[:, 2].max()))
