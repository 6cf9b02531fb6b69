r"""Parts in other processes, asked over :mod:`torch.distributed.rpc`."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from partpar import lost
from partpar.errors import PeerLostError, RemoteError
from partpar.serving import agent
from partpar.serving.outbox import PIECE
from partpar.serving.transport import MAX_BYTES, InFlight, Tensors, Transport, failure

_SLACK = 5.0  # seconds beyond its own timeout until a future counts as lost


class RpcTransport(Transport):
    r"""Asks the workers of other parts.

    Args:
        endpoint: The name under which every worker offers its verbs.
        workers: For each part, the names of its workers; the first of them is asked.
        timeout: Seconds until a part that does not answer counts as lost.
    """

    def __init__(self, endpoint: str, workers: Sequence[Sequence[str]], timeout: float = 60.0) -> None:
        self.endpoint, self.workers, self.timeout = endpoint, [list(names) for names in workers], timeout

    def begin(
        self, part: int, verb: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None
    ) -> InFlight:
        return self._ask(part, self.workers[part][0], verb, dict(tensors), dict(values or {}))

    def begin_all(
        self, part: int, verb: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None
    ) -> list[InFlight]:
        return [self._ask(part, name, verb, dict(tensors), dict(values or {})) for name in self.workers[part]]

    def name(self, part: int) -> str:
        return f"part {part} ({self.workers[part][0]})"

    def _ask(self, part: int, name: str, verb: str, tensors: Tensors, values: dict[str, Any]) -> InFlight:
        who = f"part {part} ({name})"
        try:
            future = agent.ask(name, self.endpoint, verb, tensors, values, self.timeout)
        except RuntimeError as error:  # no connection, or no agent any more
            rank = agent.rank_of(name)
            why = (None if rank is None else lost.fate(rank)) or str(error)
            raise PeerLostError(f"{who} could not be asked for {verb!r}: {why}") from error
        return _Answer(future, who, name, verb, self.timeout)


class _Answer(InFlight):
    """What a worker will answer; large tensors are fetched in pieces, all of them asked for at once."""

    def __init__(self, future: torch.futures.Future, who: str, name: str, verb: str, timeout: float) -> None:
        self._future, self._who, self._name, self._verb, self._timeout = future, who, name, verb, timeout

    def wait(self) -> Tensors:
        tensors, values = self._result(self._future)
        if "error" in values:
            raise failure(self._who, self._verb, values["error"])
        landing = {name: self._pieces(name, held) for name, held in values.get("held", {}).items()}
        for name, (out, futures) in landing.items():
            raw = out.view(-1).view(torch.uint8)
            for low, future in futures:
                got = self._result(future)
                raw[low : low + got.numel()] = got
            tensors[name] = out
        return tensors

    def _pieces(self, name: str, held: Sequence[Any]) -> tuple[Tensor, list[tuple[int, torch.futures.Future]]]:
        ticket, dtype, shape = held
        dtype = getattr(torch, dtype, None)
        size = math.prod(shape) * dtype.itemsize if isinstance(dtype, torch.dtype) else -1
        if not 0 < size <= MAX_BYTES:
            raise RemoteError(f"{self._who} answered {self._verb!r} with {name!r} of {held[1:]}: more than {MAX_BYTES} bytes")
        ranges = [(low, min(low + PIECE, size)) for low in range(0, size, PIECE)]
        futures = [(low, agent.ask_piece(self._name, ticket, low, high, self._timeout)) for low, high in ranges]
        return torch.empty(shape, dtype=dtype), futures

    def _result(self, future: torch.futures.Future) -> Any:
        if not future.done():
            # A future's own wait is deaf to Ctrl-C.
            done = threading.Event()
            future.add_done_callback(lambda _: done.set())
            if not done.wait(self._timeout + _SLACK):
                raise PeerLostError(self._lost(f"no answer within {self._timeout + _SLACK:g} s"))
        try:
            return future.value()
        except RuntimeError as error:
            raise PeerLostError(self._lost(str(error).splitlines()[0])) from error

    def _lost(self, why: str) -> str:
        rank = agent.rank_of(self._name)
        known = None if rank is None else lost.fate(rank)
        why = why if known is None else f"{known} ({why})"
        return f"{self._who} is lost: it was asked for {self._verb!r} and given {self._timeout:g} s; {why}"
