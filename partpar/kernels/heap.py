r"""What the C library does with freed memory."""

import ctypes
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 2 << 20


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def give_back() -> None:
    r"""Gives freed memory back to the system, where the C library is glibc."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def map_large_blocks() -> None:
    r"""From now on, blocks above 2 MB go back to the system when freed. By default glibc comes to keep what is below 32
    MB, in a heap whose holes others do not fit into."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * _LARGE)  # small blocks come and go: their pages stay
