r"""Coroutines on a thread of their own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import torch


def to_asyncio_future(future: torch.futures.Future) -> asyncio.Future:
    r"""What a coroutine can await of a :class:`torch.futures.Future`; errors come through."""
    loop = asyncio.get_running_loop()
    return asyncio.ensure_future(loop.run_in_executor(None, future.wait))


class ConcurrentEventLoop:
    r"""Runs coroutines, at most :obj:`concurrency` at a time. What one of them raises is raised by :meth:`run_task`, or by
    the next :meth:`wait_all`: it is not only logged.

    Args:
        concurrency: How many at a time.
    """

    def __init__(self, concurrency: int) -> None:
        self._slots = threading.BoundedSemaphore(concurrency)
        self._concurrency = concurrency
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="partpar-event-loop", daemon=True)
        self._errors: list[BaseException] = []
        self._end = weakref.finalize(self, _end, self._loop, self._thread)

    def start_loop(self) -> None:
        r"""Starts the thread, if it does not run."""
        if not self._thread.is_alive():
            self._thread.start()

    def add_task(self, coro: Coroutine[Any, Any, Any], callback: Callable[[Any], Any] | None = None) -> None:
        r"""Runs a coroutine, and :obj:`callback` on its result; waits for a free slot only."""
        self._slots.acquire()

        def done(future: Future[Any]) -> None:
            try:
                result = future.result()
                if callback is not None:
                    callback(result)
            except BaseException as error:  # noqa: BLE001 - raised by wait_all
                self._errors.append(error)
            finally:
                self._slots.release()

        asyncio.run_coroutine_threadsafe(coro, self._loop).add_done_callback(done)

    def run_task(self, coro: Coroutine[Any, Any, Any]) -> Any:
        r"""Runs a coroutine and returns its result."""
        with self._slots:
            return asyncio.run_coroutine_threadsafe(coro, self._loop).result()

    def wait_all(self) -> None:
        r"""Waits for all coroutines, and raises what the first of them raised."""
        for _ in range(self._concurrency):
            self._slots.acquire()
        for _ in range(self._concurrency):
            self._slots.release()
        if self._errors:
            error, self._errors = self._errors[0], []
            raise error

    def shutdown_loop(self) -> None:
        r"""Ends the thread. May be called again."""
        self._end()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(10.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5.0)
    if not loop.is_running():
        loop.close()
