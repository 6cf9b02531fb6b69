r"""Exact metrics over the rows of all workers, and a file of them as JSON lines."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.errors import PartparError
from partpar.route import Route
from partpar.training.together import all_numbers, all_rows

METRICS = ("accuracy", "auc")


class MetricError(PartparError, ValueError):
    r"""A metric was asked of predictions that it is not defined for."""


def accuracy(logits: Tensor, labels: Tensor, mask: Tensor, route: Route | None = None) -> float:
    r"""Returns the share of masked rows, over all workers, whose largest logit stands at their label
    (collective).

    Args:
        logits: ``[num_owned, num_classes]``.
        labels: int64 ``[num_owned]``.
        mask: bool ``[num_owned]``, the rows that count.
        route: The share's route; :obj:`None` when one process owns everything.

    Returns:
        From 0 to 1, the same on every rank; NaN if no row on any rank counts.
    """
    right = (logits[mask].argmax(dim=-1) == labels[mask]).sum()
    right_all, count_all = (
        all_numbers([float(right), float(mask.sum())], None if route is None else route.group)
        .sum(dim=0)
        .tolist()
    )
    return right_all / count_all if count_all else float("nan")


def roc_auc(logits: Tensor, labels: Tensor, mask: Tensor, route: Route | None = None) -> float:
    r"""Returns the area under the ROC curve of two classes over the masked rows of all workers (collective).

    Every rank gathers one score and one label for each masked row, which makes ties across ranks count
    exactly.

    Args:
        logits: ``[num_owned, 2]``, or ``[num_owned]`` scores.
        labels: int64 ``[num_owned]`` of 0 and 1.
        mask: bool ``[num_owned]``, the rows that count.
        route: The share's route; :obj:`None` when one process owns everything.

    Returns:
        From 0 to 1, the same on every rank; NaN if the rows are all of one class.

    Raises:
        MetricError: If there are not two classes; on every rank.
    """
    columns = 1 if logits.dim() == 1 else logits.size(1)
    if columns > 2:
        raise MetricError(
            f"the ROC AUC is of two classes, but the model tells {columns} apart; use the accuracy"
        )
    scores = (
        logits if logits.dim() == 1 else logits[:, -1] - logits[:, 0] if columns == 2 else logits[:, 0]
    )[mask]
    # One exchange for both: float64 holds every float32 score and every small integer as it is.
    rows = all_rows(
        torch.stack([scores.detach().double(), labels[mask].double()], dim=1),
        None if route is None else route.group,
    )
    targets = rows[:, 1].long()
    if targets.numel() and (targets.min() < 0 or targets.max() > 1):
        raise MetricError(
            f"the ROC AUC takes labels 0 and 1, but found {int(targets.min())} to {int(targets.max())}"
        )
    if targets.unique().numel() < 2:
        return float("nan")
    # Ranks instead of scores: torchmetrics squashes scores outside 0..1 by a sigmoid, which would tie extreme
    # ones.
    ranks = rows[:, 0].unique(return_inverse=True)[1].double()
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(ranks / ranks.max().clamp(min=1), targets))


def measure(name: str, logits: Tensor, labels: Tensor, mask: Tensor, route: Route | None = None) -> float:
    r"""Returns the metric of a name: ``"accuracy"`` or ``"auc"`` (collective)."""
    if name not in METRICS:
        raise MetricError(f"metric must be one of {', '.join(METRICS)}, but found {name!r}")
    return (accuracy if name == "accuracy" else roc_auc)(logits, labels, mask, route)


class JsonLines:
    r"""Appends records to a file, one JSON object a line; rank 0 writes, the others do not.

    Each record is one system call in append mode, so that lines of runs that share a file are never mixed, and
    a killed run or a full disk leaves whole lines.

    Args:
        path: The file, created with its folder where absent; :obj:`None` writes nothing.
        rank: Of this worker.
    """

    def __init__(self, path: str | Path | None, rank: int = 0) -> None:
        self.path = Path(path) if path is not None and rank == 0 else None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **record: Any) -> None:
        r"""Appends one record. A number that is NaN becomes ``null``, which JSON can say.

        Raises:
            OSError: It could not be written; the file is as before.
        """
        if self.path is None:
            return
        known = {
            key: None if isinstance(value, float) and value != value else value
            for key, value in record.items()
        }
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            line = (json.dumps(known, allow_nan=False) + "\n").encode()
            written = os.write(file, line)
            if written < len(line):
                end = os.lseek(file, 0, os.SEEK_CUR)
                if end == os.fstat(file).st_size:  # nobody wrote behind it
                    os.ftruncate(file, end - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from None
        finally:
            os.close(file)
