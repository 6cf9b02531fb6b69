r"""Training on the full graph: every epoch is one step on all labelled nodes of all workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partpar.errors import GraphError, RouteError
from partpar.exchange import meter
from partpar.graph import GraphData
from partpar.graph.validate import check_classes
from partpar.kernels.adjacency import Adjacency
from partpar.models import BasicGNN
from partpar.nn import SourceRows, global_mean, keep_halo
from partpar.nn.rows import takes_route
from partpar.route import Route
from partpar.training.best import BestWeights
from partpar.training.checkpoint import Checkpointer
from partpar.training.machine import peak_memory
from partpar.training.metrics import measure
from partpar.training.progress import Progress
from partpar.training.together import all_numbers

SPLITS = ("train", "val", "test")
PHASES = ("compute", "exchange", "evaluation")
Inputs: TypeAlias = tuple[Tensor | SourceRows, Tensor | Adjacency]


@dataclass(frozen=True)
class Epoch:
    r"""What one epoch did. Losses and metrics are those of the whole graph, the same on every rank.

    Args:
        epoch: Its number, from 1.
        loss: Training loss before the step.
        train: Metric on the training rows after the step, NaN without such rows; likewise :obj:`val` and
            :obj:`test`.
        seconds: Wall time of the step on this rank, evaluation apart.
        exchange_seconds: Part of it that this rank was blocked in exchanges.
    """

    epoch: int
    loss: float
    train: float
    val: float
    test: float
    seconds: float
    exchange_seconds: float


@dataclass
class History:
    r"""What a training did.

    Args:
        epochs: All epochs, in order.
        best: The epoch of the highest validation metric, whose weights the model has at the end.
        peak_bytes: Peak memory of each rank's process so far.
        exchange_share: Part of each rank's training time that it was blocked in exchanges.
        phase_seconds: Time of each rank in each phase: computing steps, blocked in their exchanges, evaluating.
        traffic: Rows that each rank sends to each in one exchange, ``[world_size][world_size]``.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    peak_bytes: list[int] = field(default_factory=list)
    exchange_share: list[float] = field(default_factory=list)
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)
    traffic: list[list[int]] = field(default_factory=list)

    @property
    def record(self) -> dict[str, Any]:
        r"""What a log of the run should end with: figures of every rank, which ``partpar report`` draws."""
        return {"phase_seconds": self.phase_seconds, "traffic": self.traffic, "peak_bytes": self.peak_bytes}

    def state_dict(self) -> dict[str, Any]:
        r"""The epochs and which is best, for a checkpoint."""
        rows = [list(asdict(epoch).values()) for epoch in self.epochs]
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(fields(Epoch)))
        return {"epochs": table, "best": 0 if self.best is None else self.best.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Takes a state of :meth:`state_dict` over."""
        self.epochs = [Epoch(int(number), *rest) for number, *rest in state["epochs"].tolist()]
        self.best = self.epochs[state["best"] - 1] if state["best"] else None

    @property
    def losses(self) -> list[float]:
        r"""The training loss of each epoch."""
        return [epoch.loss for epoch in self.epochs]

    @property
    def epoch_seconds(self) -> float:
        r"""Median time of an epoch's step on this rank."""
        return torch.tensor([epoch.seconds for epoch in self.epochs]).median().item()


def fit(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    share: GraphData,
    route: Route,
    epochs: int = 200,
    patience: int | None = None,
    metric: str = "accuracy",
    on_epoch: Callable[..., None] | None = None,
    progress: bool = False,
    checkpoints: Checkpointer | None = None,
) -> History:
    r"""Trains a classifier of nodes on the full graph (collective).

    The share's owned nodes need ``x`` and ``y``, and ``train_mask``; ``val_mask`` and ``test_mask`` are used
    where there are any. Without validation rows nothing is selected: the last epoch is the best.

    Args:
        model: Called as ``model(x, edge_index, route=route)``, see :func:`model_inputs`; returns
            ``[num_owned, num_classes]``. In :class:`~torch.nn.parallel.DistributedDataParallel` if there are
            several workers.
        optimizer: Of the model's parameters.
        share: This worker's share.
        route: Of the share.
        epochs: Number of epochs at most.
        patience: Epochs without a better validation metric after which to stop; :obj:`None` goes on to the
            end.
        metric: ``"accuracy"`` or ``"auc"``.
        on_epoch: Called on every rank as ``on_epoch(epoch=1, loss=..., ...)`` with the fields of an
            :class:`Epoch`.
        progress: Whether this rank draws a progress bar on standard error.
        checkpoints: Where the training goes on from and is kept; the history and the best weights are added to its state.

    Returns:
        The :class:`History`; the model has the weights of its best epoch.

    Raises:
        GraphError: If the share lacks an attribute, or labels are not one integer a node.
        RouteError: The model takes no route.
    """
    owned = share.node("dst")
    missing = [name for name in ("x", "y", "train_mask") if name not in owned]
    if missing:
        raise GraphError(
            f"expected node attributes x, y and train_mask to train on, found no {', '.join(missing)}"
        )
    check_classes("labels 'y' of nodes", owned["y"])
    history, evaluating = History(), 0.0
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not takes_route(inner):
        raise RouteError(
            f"expected a model that is called as model(x, edge_index, route=route), found {type(inner).__name__}, whose "
            "forward takes no route; wrap it by partpar.nn.route_model, or use one of partpar.models"
        )
    best_weights = BestWeights(inner)
    inputs = model_inputs(inner, share, route)
    no_rows = torch.zeros(share.num_owned(), dtype=torch.bool, device=share.device)
    masks = {split: owned.get(f"{split}_mask", no_rows) for split in SPLITS}

    def step() -> Tensor:
        model.train()
        optimizer.zero_grad()
        logits = model(*inputs, route=route)
        loss = global_mean(
            F.cross_entropy(logits, owned["y"], reduction="none", ignore_index=-1), masks["train"], route
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    kept = Checkpointer(None) if checkpoints is None else checkpoints
    kept.track(history=history, best_weights=best_weights)
    kept.resume()
    shown = Progress(kept.step + 1, epochs, progress)
    for number in shown:
        # Every rank has the same metrics, so every rank stops at the same epoch.
        if patience is not None and history.best is not None and number - 1 - history.best.epoch >= patience:
            break
        blocked, start = meter.seconds, time.perf_counter()
        loss = step().item()
        seconds, blocked = time.perf_counter() - start, meter.seconds - blocked
        start = time.perf_counter()
        scores = evaluate(inner, share, route, masks, metric, inputs)
        evaluating += time.perf_counter() - start
        epoch = Epoch(number, loss, scores["train"], scores["val"], scores["test"], seconds, blocked)
        history.epochs.append(epoch)
        if on_epoch is not None:
            on_epoch(**asdict(epoch))
        shown.tell(number, loss=f"{loss:.4f}", val=f"{epoch.val:.4f}", exchange=f"{blocked / seconds:.0%}")
        if history.best is None or epoch.val > history.best.val or epoch.val != epoch.val:
            history.best = epoch
            best_weights.keep()
        kept.save(number, force=number == epochs)
    shown.close()
    best_weights.put_back()

    spent = sum(epoch.seconds for epoch in history.epochs)
    exchanged = sum(epoch.exchange_seconds for epoch in history.epochs)
    numbers = [peak_memory(), exchanged / spent if spent else 0.0, spent - exchanged, exchanged, evaluating]
    table = all_numbers([*numbers, *route.send_splits], route.group)
    history.peak_bytes, history.exchange_share = table[:, 0].long().tolist(), table[:, 1].tolist()
    history.phase_seconds = dict(zip(PHASES, table[:, 2:5].T.tolist(), strict=True))
    history.traffic = table[:, 5:].long().tolist()
    return history


def model_inputs(model: torch.nn.Module, share: GraphData, route: Route) -> Inputs:
    r"""What to call a model with before the route (collective): the models of :mod:`partpar.models` take constant
    rows with their halo and the share's adjacency, which is fastest; any other gets ``x`` and ``edge_index``."""
    x = share.node("dst")["x"]
    if isinstance(model, BasicGNN):
        return keep_halo(x, route), share.adj()
    return x, share.edge_index()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    share: GraphData,
    route: Route,
    masks: dict[str, Tensor],
    metric: str = "accuracy",
    inputs: Inputs | None = None,
) -> dict[str, float]:
    r"""Runs the model once on the full graph, in evaluation mode, and measures it on each split (collective).

    Args:
        model: As in :func:`fit`, without :class:`~torch.nn.parallel.DistributedDataParallel`.
        share: This worker's share.
        route: Of the share.
        masks: bool ``[num_owned]`` for each split.
        metric: ``"accuracy"`` or ``"auc"``.
        inputs: Of :func:`model_inputs`, made here by default.

    Returns:
        The metric over all workers for each split.
    """
    model.eval()
    owned = share.node("dst")
    logits = model(*(model_inputs(model, share, route) if inputs is None else inputs), route=route)
    return {split: measure(metric, logits, owned["y"], mask, route) for split, mask in masks.items()}
