r"""What a part makes when it is first asked for, on a thread of its own: to make it, it must ask others, which no
handler may do. Meanwhile it answers "later", and who asked asks again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from partpar.errors import PeerLostError
from partpar.serving.transport import InFlight, Tensors, Transport

T = TypeVar("T")
LATER = "later"
_PAUSES = (0.002, 0.05)  # seconds between two questions, the first and the longest


def later() -> Tensors:
    r"""The answer of a part that is not ready."""
    return {LATER: torch.empty(0)}


class MadeOnce(Generic[T]):
    r"""Things by key, each made once.

    Args:
        make: Makes one; what it raises is raised to all who ask.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._made: dict[Hashable, T] = {}
        self._errors: dict[Hashable, Exception] = {}
        self._threads: dict[Hashable, threading.Thread] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        r"""The thing, or :obj:`None` while it is being made."""
        with self._lock:
            if key not in self._threads:
                self._threads[key] = threading.Thread(target=self._run, args=(key,), daemon=True)
                self._threads[key].start()
        if key in self._errors:
            raise self._errors[key]
        return self._made.get(key)

    def wait(self, key: Hashable) -> T:
        r"""The thing, once it is made."""
        self.get(key)
        self._threads[key].join()
        made = self.get(key)
        assert made is not None
        return made

    def close(self, timeout: float) -> None:
        r"""Waits for what is being made."""
        for thread in list(self._threads.values()):
            thread.join(timeout)

    def _run(self, key: Hashable) -> None:
        try:
            self._made[key] = self._make(key)
        except Exception as error:  # noqa: BLE001 - it is raised where the thing is asked for
            self._errors[key] = error


class Patient(InFlight):
    r"""A question that is asked again as long as the answer is "later".

    Args:
        transport: To ask with.
        part: Whom.
        verb: For what.
        tensors: With these tensors
        values: and these values.
        timeout: Seconds until the part must be ready.
    """

    def __init__(
        self,
        transport: Transport,
        part: int,
        verb: str,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self._ask = lambda: transport.begin(part, verb, tensors, values)
        self._what = f"{transport.name(part)} is not ready for {verb!r} after {timeout:g} s"
        self._deadline, self._flight = time.monotonic() + timeout, self._ask()

    def wait(self) -> Tensors:
        pause = _PAUSES[0]
        while LATER in (answer := self._flight.wait()):
            if time.monotonic() > self._deadline:
                raise PeerLostError(self._what)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])
            self._flight = self._ask()
        return answer
