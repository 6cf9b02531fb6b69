r"""What one process asks of its machine: cores, threads, the C library's allocator, peak memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import sys
from pathlib import Path

import torch

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def usable_cores() -> int:
    r"""Returns the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_worker(local_world_size: int) -> int:
    r"""Returns the threads that each of :obj:`local_world_size` workers of one machine gets: an equal share
    of its cores, at least one."""
    return max(1, usable_cores() // local_world_size)


def huge_pages() -> bool:
    r"""Whether torch asks the system for huge pages, as ``THP_MEM_ALLOC_ENABLE=1`` makes it do if that is in
    the environment before the first tensor is made."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    # torch aligns blocks to pages then, and to 64 bytes otherwise; behind a header, the latter is never a
    # page's begin.
    return torch.empty(1 << 23, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE == 0


def tune_allocator(threshold: int = 1 << 30) -> bool:
    r"""Makes glibc serve blocks of up to :obj:`threshold` bytes from its heap and keep them when freed.

    By default glibc maps every block above 32 MB afresh, so each large temporary of each epoch faults all its
    pages in again.

    Returns:
        Whether it took effect; :obj:`False` with another C library, or one that refuses so large a threshold.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, threshold)) and bool(mallopt(_M_TRIM_THRESHOLD, threshold))


def forget_peak_memory() -> bool:
    r"""Gives freed blocks back to the system and makes :func:`peak_memory` count from now on.

    Returns:
        Whether it took effect; :obj:`False` where the system is not Linux or does not allow it.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    r"""Returns the most bytes of memory that this process ever held (its resident set, mapped files
    included).

    Linux's own high-water mark is asked first: ``getrusage`` also counts what the process held before it
    became this program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
