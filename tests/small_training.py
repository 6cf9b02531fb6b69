r"""A small training whose state is kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from partpar.nn import Dropout
from partpar.training import Checkpointer
from partpar.training.checkpoint_files import steps_in


class Training:
    r"""A small training that draws from everything that a checkpoint has to keep."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what others draw from
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), Dropout(0.5, seed=1, layer=0), torch.nn.Dropout(0.2),
            torch.nn.Linear(8, 1),
        ).double()  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], 0.5)
        self.draw = torch.Generator().manual_seed(seed)

    @property
    def state(self) -> dict[str, Any]:
        names = ("model", "optimizer", "schedule", "draw")
        return {name: getattr(self, name) for name in names}

    def step(self) -> float:
        x = torch.randn(16, 4, generator=self.draw, dtype=torch.float64) + random.random()
        x = x + np.random.rand()  # noqa: NPY002
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean() + torch.rand(()).double()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def kept(folder: Path, **options: Any) -> list[int]:
    with Checkpointer(folder, Training().state, resume=True, **options):
        pass
    return steps_in(folder)


def three_steps(folder: Path, **options: Any) -> None:
    training = Training()
    with Checkpointer(folder, training.state, **options) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, loss=training.step())
