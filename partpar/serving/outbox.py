r"""Large answers, kept until they are fetched piece by piece: one message of 50 MB travels at a quarter of the rate of
five of 10."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from partpar.errors import ServiceError
from partpar.serving.transport import Tensors, Values

PIECE = 16 << 20  # bytes
_KEPT = 120.0  # seconds: who has not fetched by then has gone


@dataclass
class _Held:
    data: Tensor  # uint8
    left: int  # bytes that nobody fetched yet
    since: float


class Outbox:
    r"""Answers under tickets."""

    def __init__(self, piece: int = PIECE) -> None:
        self.piece = piece
        self._held: dict[int, _Held] = {}
        self._tickets = itertools.count(1)
        self._lock = threading.Lock()

    def hold(self, answer: Tensors) -> tuple[Tensors, Values]:
        r"""What to send at once: small tensors, and for each large one ``[ticket, dtype, shape]``."""
        if all(tensor.nbytes <= self.piece for tensor in answer.values()):
            return answer, {}
        small, held = {}, {}
        with self._lock:
            now = time.monotonic()
            for ticket in [t for t, h in self._held.items() if now - h.since > _KEPT]:
                del self._held[ticket]
            for name, tensor in answer.items():
                if tensor.nbytes <= self.piece:
                    small[name] = tensor
                    continue
                ticket = next(self._tickets)
                data = tensor.contiguous().view(-1).view(torch.uint8)
                self._held[ticket] = _Held(data, data.numel(), now)
                held[name] = [ticket, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        return small, {"held": held}

    def take(self, ticket: int, low: int, high: int) -> Tensor:
        r"""Bytes ``low..high-1`` of what is held under a ticket, which is void once all were taken."""
        with self._lock:
            held = self._held.get(ticket)
            if held is None or not 0 <= low < high <= held.data.numel() or high - low > self.piece:
                raise ServiceError(f"expected a piece of an answer that is kept, found {ticket}: {low} to {high}")
            held.left -= high - low
            if held.left <= 0:
                del self._held[ticket]
        return held.data[low:high]

    def clear(self) -> None:
        r"""Lets go of everything."""
        with self._lock:
            self._held.clear()
