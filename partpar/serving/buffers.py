r"""Memory for rows, used again. A fresh block of some megabytes is paged in when it is written first, which costs several
times the gather that fills it."""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes that are not worth it
_MOST = 16  # blocks
_IDLE_REFERENCES = 3  # the list's, the loop's and the argument's: no tensor is left that needs the block


class Buffers:
    r"""Blocks that are taken again once every tensor over them is gone."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        r"""As :func:`torch.empty`."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALL:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            block = self._idle(size)
            if block is None and len(self._blocks) >= _MOST:
                return torch.empty(shape, dtype=dtype)
            if block is None:
                block = np.empty(size + size // 4, np.uint8)  # batches differ a little in size
                self._blocks.append(block)
            # The tensor holds the slice and the slice the block, so the block's references tell.
            return torch.from_numpy(block[:size]).view(dtype).view(shape)

    def _idle(self, size: int) -> np.ndarray | None:
        """The smallest idle block that fits; others that are idle and too small are let go."""
        found, kept = None, []
        for block in self._blocks:
            idle = sys.getrefcount(block) <= _IDLE_REFERENCES
            if idle and block.nbytes < size:
                continue
            kept.append(block)
            if idle and (found is None or block.nbytes < found.nbytes):
                found = block
        self._blocks = kept
        return found
