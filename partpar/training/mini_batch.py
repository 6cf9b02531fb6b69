r"""Training on sampled batches: an epoch, its sums over all workers, and a whole run that keeps its best weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from partpar.training.best import BestWeights
from partpar.training.checkpoint import Checkpointer
from partpar.training.machine import peak_memory
from partpar.training.progress import Progress
from partpar.training.together import all_numbers

LossOf = Callable[[Any], tuple[Tensor, int]]


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


@dataclass
class BatchHistory:
    r"""What a training on batches did.

    Args:
        epochs: All epochs, in order.
        scores: What was measured after each of them.
        best: Number, from 1, of the epoch with the highest ``"val"`` among its scores, whose weights the model has at the
            end; 0 without any epoch.
        peak_bytes: Peak memory of each rank's process so far.
    """

    epochs: list[BatchEpoch] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    peak_bytes: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        r"""The epochs, their scores and which is best, for a checkpoint."""
        return {"epochs": [asdict(epoch) for epoch in self.epochs], "scores": self.scores, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Takes a state of :meth:`state_dict` over."""
        self.epochs = [BatchEpoch(**epoch) for epoch in state["epochs"]]
        self.scores, self.best = state["scores"], state["best"]

    @property
    def best_scores(self) -> dict[str, float]:
        r"""What was measured after the best epoch."""
        return self.scores[self.best - 1] if self.best else {}

    @property
    def seeds_per_second(self) -> float:
        r"""Of all workers, in the median epoch."""
        return statistics.median(epoch.seeds / epoch.seconds for epoch in self.epochs)


def train_epoch(
    loader: Iterable[Any], loss_of: LossOf, optimizer: torch.optim.Optimizer, group: ProcessGroup | None = None
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


def fit_batches(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Any],
    loss_of: LossOf,
    evaluate: Callable[[], dict[str, float]],
    epochs: int = 10,
    group: ProcessGroup | None = None,
    on_epoch: Callable[..., None] | None = None,
    progress: bool = False,
    checkpoints: Checkpointer | None = None,
) -> BatchHistory:
    r"""Trains on the batches of a loader, and measures after each epoch (collective).

    Args:
        model: In :class:`~torch.nn.parallel.DistributedDataParallel` if there are several workers.
        optimizer: Of the model's parameters.
        loader: Yields as many batches on every rank; each time that it is gone through, an epoch.
        loss_of: The loss of a batch, a mean, and over how many seeds.
        evaluate: What to measure, the same on every rank, ``"val"`` among it. Called without gradients, the model being
            in evaluation mode.
        epochs: How many.
        group: The process group; :obj:`None` when alone.
        on_epoch: Called on every rank as ``on_epoch(epoch=1, loss=..., ...)`` with the fields of a :class:`BatchEpoch` but
            for its seeds, and with what was measured.
        progress: Whether this rank draws a progress bar on standard error.
        checkpoints: Where the training goes on from and is kept; the history and the best weights are added to its state,
            which should have all loaders that are read.

    Returns:
        The :class:`BatchHistory`; the model has the weights of its best epoch.
    """
    history, kept = BatchHistory(), Checkpointer(None) if checkpoints is None else checkpoints
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    best_weights = BestWeights(inner)
    kept.track(history=history, best_weights=best_weights)
    kept.resume()
    shown = Progress(kept.step + 1, epochs, progress)
    for number in shown:
        model.train()
        done = train_epoch(loader, loss_of, optimizer, group)
        model.eval()
        with torch.no_grad():
            scores = evaluate()
        history.epochs.append(done)
        history.scores.append(scores)
        if on_epoch is not None:
            on_epoch(epoch=number, loss=done.loss, seconds=done.seconds, phase_seconds=done.phase_seconds, **scores)
        shown.tell(number, loss=f"{done.loss:.4f}", val=f"{scores['val']:.4f}")
        if not history.best or scores["val"] > history.best_scores["val"]:
            history.best = number
            best_weights.keep()
        kept.save(number, force=number == epochs)
    shown.close()
    best_weights.put_back()
    history.peak_bytes = all_numbers([peak_memory()], group)[:, 0].long().tolist()
    return history
