r"""Reading back what :class:`~partpar.training.JsonLines` wrote of a training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partpar.errors import PartparError


class RunLogError(PartparError, ValueError):
    r"""A file is not the log of a training."""


@dataclass
class Run:
    r"""One training.

    Args:
        epochs: The records that have an ``epoch``, in order.
        end: What the log ends with, such as :attr:`partpar.training.History.record`; empty where it ends with an epoch.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def phase_seconds(self) -> dict[str, list[float]]:
        r"""Time of each rank in each phase of the run: as its end says, or as its epochs add up to."""
        if "phase_seconds" in self.end:
            return dict(self.end["phase_seconds"])
        total: dict[str, list[float]] = {}
        for epoch in self.epochs:
            for name, seconds in epoch.get("phase_seconds", {}).items():
                before = total.get(name, [0.0] * len(seconds))
                total[name] = [a + b for a, b in zip(before, seconds, strict=True)]
        return total

    def curve(self, name: str) -> list[tuple[float, float]]:
        r"""Epochs and values of a number, where there is one."""
        points = [(e["epoch"], e.get(name)) for e in self.epochs]
        return [(float(x), float(y)) for x, y in points if isinstance(y, (int, float))]


def read_runs(path: str | Path) -> list[Run]:
    r"""The trainings in a file; one begins where epochs begin again.

    Raises:
        RunLogError: If the file is absent, a line is no JSON object, or no line is of an epoch.
    """
    path = Path(path)
    if not path.is_file():
        raise RunLogError(f"{path}: expected a file of JSON lines, such as --metrics writes, found none")
    runs: list[Run] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunLogError(f"{path}, line {number}: expected a JSON object, found {error}") from error
        if not isinstance(record, dict):
            raise RunLogError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
        epoch = record.get("epoch")
        if isinstance(epoch, int):
            if not runs or runs[-1].end or (runs[-1].epochs and epoch <= runs[-1].epochs[-1]["epoch"]):
                runs.append(Run())
            runs[-1].epochs.append(record)
        elif runs:
            runs[-1].end.update(record)
    if not runs:
        raise RunLogError(f"{path}: expected lines with an epoch, found none; train with --metrics {path}")
    return runs
