r"""What PyG leaves in the folder of temporary files: the source of each layer's message passing, one file for each process
and class."""

from __future__ import annotations

import atexit
import sys
import tempfile
from functools import cache
from pathlib import Path


@cache
def remove_templates_at_exit() -> None:
    r"""Has this process remove its own at its end."""
    atexit.register(remove_templates)


def remove_templates() -> None:
    r"""Removes the source files of modules that PyG wrote, loaded and kept. Nothing reads them again."""
    folder = Path(tempfile.gettempdir())
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        # As `tempfile` names them: no module that somebody wrote is called otherwise than its file.
        if file.parent == folder and file.name.startswith(f"{name}_"):
            file.unlink(missing_ok=True)
