r"""What every training script takes on its command line to keep checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from partpar.errors import CheckpointError
from partpar.training.checkpoint import Checkpointer


def add_checkpoint_arguments(parser: argparse.ArgumentParser, unit: str = "epochs") -> None:
    r"""Adds ``--checkpoint-dir``, ``--checkpoint-every`` and ``--resume``.

    Args:
        parser: Of the script.
        unit: What is counted.
    """
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--checkpoint-dir", type=Path, help="folder to keep the newest three checkpoints in")
    group.add_argument("--checkpoint-every", type=int, default=10, metavar="N", help=f"{unit} from one to the next")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")


def open_checkpoints(
    args: argparse.Namespace, state: dict[str, Any], group: ProcessGroup | None = None, folder: str = ""
) -> Checkpointer:
    r"""The checkpoints that the arguments ask for (collective); without ``--checkpoint-dir`` none are kept.

    Args:
        args: With those of :func:`add_checkpoint_arguments`.
        state: See :class:`~partpar.training.Checkpointer`.
        group: The process group; by default all processes.
        folder: Below ``--checkpoint-dir``, where a script trains several times.

    Raises:
        CheckpointError: ``--resume`` without ``--checkpoint-dir``, or as by the class.
    """
    if args.resume and args.checkpoint_dir is None:
        raise CheckpointError("--resume: expected --checkpoint-dir, the folder to go on from, found none; give it")
    root = None if args.checkpoint_dir is None else args.checkpoint_dir / folder
    return Checkpointer(root, state, group, every=args.checkpoint_every, resume=args.resume)
