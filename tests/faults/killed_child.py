r"""Runs a script in which this process kills itself at a chosen point, once: ``killed_child.py SCRIPT ARGUMENTS…``.

``PARTPAR_TEST_KILL=point:rank:call`` says where; a process that torchrun started anew is spared.
"""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from partpar.training import checkpoint_files, checkpoint_storage

# Where: the module or class, the name there, and whether the call is made before the end comes.
POINTS: dict[str, tuple[Any, str, bool]] = {
    "step": (torch.optim.Adam, "step", True),
    "write": (checkpoint_storage, "save_file", True),
    "marker": (checkpoint_files, "_marker", False),
    "rename": (checkpoint_files.os, "rename", False),
    "renamed": (checkpoint_files.os, "rename", True),
}


def main() -> None:
    point, rank, call = os.environ["PARTPAR_TEST_KILL"].split(":")
    if os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        place, name, after = POINTS[point]
        setattr(place, name, end_at(getattr(place, name), int(call), after))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def end_at(function: Callable[..., Any], call: int, after: bool) -> Callable[..., Any]:
    left = call

    @functools.wraps(function)
    def ending(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            end()
        done = function(*args, **kwargs)
        if left == 0:
            end()
        return done

    return ending


def end() -> None:
    Path("killed").touch()  # so that the test knows
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
