r"""Saves four checkpoints of a small module whose rows say which step they are of: ``saving_child.py FOLDER``."""

from __future__ import annotations

import sys

import torch

from partpar.training import Checkpointer


def main() -> None:
    module = torch.nn.Linear(4, 4)
    with Checkpointer(sys.argv[1], {"module": module}, asynchronous=False, keep=2) as checkpoints:
        for step in range(1, 5):
            with torch.no_grad():
                module.weight.fill_(step)
            checkpoints.save(step, name=f"of step {step}")


if __name__ == "__main__":
    main()
