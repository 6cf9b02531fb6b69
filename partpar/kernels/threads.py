r"""Running a compiled loop over rows on several threads.

A kernel here is a ``nogil`` Numba function ``body(lo, hi, *args)`` that works on the rows ``lo..hi-1`` and on
nothing else. This file cuts the rows into chunks of about equal work and lets plain Python threads take one
chunk after the other. That needs no threading layer of Numba (one of which aborts under concurrent threads),
compiles each kernel once instead of once serial and once parallel, and makes each row's result the work of
one thread alone, so that results do not depend on the number of threads.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

# Below so many multiply-adds a kernel ends before a second thread has woken.
SERIAL_WORK = 1 << 19
# Chunks per thread: enough that an unlucky chunk does not keep the others waiting.
CHUNKS_PER_THREAD = 8

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < size:
            _pool = ThreadPoolExecutor(size, thread_name_prefix="partpar-kernel")
            _pool_size = size
        return _pool


def num_workers(work: int) -> int:
    r"""The number of threads that a loop of :obj:`work` multiply-adds is worth: torch's own setting, or
    one.
    """
    return torch.get_num_threads() if work > SERIAL_WORK else 1


def for_rows(
    body: Callable[..., None],
    indptr: np.ndarray,
    width: int,
    args: tuple[Any, ...],
    per_worker: Sequence[Any] | None = None,
) -> None:
    r"""Runs ``body(lo, hi, *args)`` over all rows of a compressed matrix.

    Args:
        body: A ``nogil`` function that handles the rows ``lo..hi-1``.
        indptr (numpy.ndarray): int64 ``[num_rows + 1]``, where each row's entries begin.
        width (int): The number of multiply-adds per entry, to judge whether threads are worth their start.
        args (tuple): What the body is given after ``lo, hi``.
        per_worker (sequence, optional): One scratch object for each of ``num_workers(...)`` threads, given to
            the body as its last argument. (default: :obj:`None`)
    """
    num_rows = len(indptr) - 1
    entries = int(indptr[-1])
    workers = num_workers((entries + num_rows) * width) if per_worker is None else len(per_worker)
    if workers == 1:
        body(0, num_rows, *args, *(() if per_worker is None else (per_worker[0],)))
        return

    # A row costs its entries, and one more for writing it: both grow with the row, so the cut is a search.
    targets = np.linspace(0, entries + num_rows, workers * CHUNKS_PER_THREAD + 1)[1:-1]
    cuts = np.searchsorted(indptr + np.arange(num_rows + 1), targets)
    bounds = [0, *cuts.tolist(), num_rows]
    ticket = itertools.count()

    def work(worker: int) -> None:
        scratch = () if per_worker is None else (per_worker[worker],)
        while (chunk := next(ticket)) < len(bounds) - 1:
            if bounds[chunk] < bounds[chunk + 1]:
                body(bounds[chunk], bounds[chunk + 1], *args, *scratch)

    pool = _executor(workers - 1)
    futures = [pool.submit(work, worker) for worker in range(1, workers)]
    try:
        work(0)
    finally:
        for future in futures:
            future.result()
