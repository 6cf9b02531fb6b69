r"""Several batches under way on threads, yielded in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class InOrder(Generic[T, R], Iterator[R]):
    r"""Calls ``make`` on tasks ahead of who reads the results. An error is raised where its result would have come.

    Dropping the iterator, or :meth:`close`, ends its threads; what is being made is waited for, the rest is not begun.

    Args:
        make: Makes a result of a task; called from several threads.
        tasks: In order.
        concurrency: How many are made at a time.
        ahead: How many results at most wait or are made.
    """

    def __init__(self, make: Callable[[T], R], tasks: Iterable[T], concurrency: int, ahead: int) -> None:
        self._make, self._tasks, self._ahead = make, iter(tasks), max(ahead, concurrency)
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(concurrency, thread_name_prefix="partpar-loader")
        self._waiting: deque[Future[R]] = deque()
        self._fill()

    def _fill(self) -> None:
        assert self._pool is not None
        while len(self._waiting) < self._ahead:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            self._waiting.append(self._pool.submit(self._make, task))

    def __next__(self) -> R:
        if not self._waiting:
            self.close()
            raise StopIteration
        try:
            result = self._waiting.popleft().result()
        except BaseException:  # Ctrl-C among them: leave no thread behind
            self.close()
            raise
        self._fill()
        return result

    def close(self) -> None:
        r"""Ends the threads. May be called again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._waiting.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()
