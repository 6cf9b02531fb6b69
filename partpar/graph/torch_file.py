r"""Files that :func:`torch.save` wrote, read without running any code of theirs."""

from __future__ import annotations

import pickle  # only for the name of the error that torch.load raises
import struct
from pathlib import Path
from typing import Any

import torch

from partpar.errors import PartparError

# What torch's reader raises where a file is another one: it takes any bytes for a program, until one does not fit.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)


def read_saved(path: Path, error: type[PartparError], expected: str) -> Any:
    r"""Reads tensors, plain values and what :func:`torch.serialization.safe_globals` allows.

    Args:
        path: The file.
        error: Raised if it holds anything else.
        expected: What it should hold, for the message.
    """
    try:
        return torch.load(path, weights_only=True)
    except _UNREADABLE as found:
        # torch's own words advise to let the file run code, which is never done here.
        raise error(f"{path}: expected {expected}, found something else ({type(found).__name__})") from None
