r"""A network slower than the one at hand: exchanges take as long as they would at a given bandwidth and
latency.

Overlap, and what it is worth, shows on a network whose transfers cost no processor time. Several processes on
one machine have none: here they wait as such a network would have them wait, and do not work meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from partpar import exchange
from partpar.errors import PartparError


class NetworkError(PartparError, ValueError):
    r"""A network was described that cannot be."""


@dataclass
class Traffic:
    r"""What the exchanges of rows of this process were since the last :meth:`reset`.

    Args:
        exchanges: How many began.
        bytes_sent: Payload handed to other ranks.
        bytes_received: Payload that came from other ranks.
        visible_seconds: Time blocked for rows to come.
        hidden_seconds: Time that rows were on their way while this process did something else.
    """

    exchanges: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    visible_seconds: float = 0.0
    hidden_seconds: float = 0.0

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


@dataclass
class SimulatedNetwork:
    r"""Within this context, exchanges of rows end no earlier than they would over a network interface that
    sends and receives :obj:`gbit` each, one exchange after the other. Without a limit exchanges are only
    watched.

    Every rank has an interface of its own. Transfers are timed from the moment at which this rank begins
    them, so ranks should enter it alike. Reductions, such as those of gradients, are not slowed down.

    Args:
        gbit: Bandwidth in each direction, Gbit/s; :obj:`None` for no limit.
        latency: Seconds from an exchange's begin to its first byte's arrival.
        traffic: What was exchanged so far.

    Raises:
        NetworkError: If the bandwidth is not above 0, or the latency below 0.
    """

    gbit: float | None = None
    latency: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    _free_at: float = 0.0
    _before: Any = None

    def __post_init__(self) -> None:
        if (self.gbit is not None and self.gbit <= 0) or self.latency < 0:
            raise NetworkError(
                f"expected a bandwidth above 0 Gbit/s and a latency of at least 0 seconds, found {self.gbit} and {self.latency}"
            )

    def seconds(self, num_bytes: int) -> float:
        r"""How long the interface is busy with so many bytes in one direction."""
        return 0.0 if self.gbit is None else num_bytes * 8 / (self.gbit * 1e9)

    def __enter__(self) -> SimulatedNetwork:
        self._before, exchange.all_to_all = exchange.all_to_all, self._begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exchange.all_to_all = self._before

    def _begin(
        self,
        out: Tensor,
        rows: Tensor,
        recv_splits: Sequence[int],
        send_splits: Sequence[int],
        group: Any,
        async_op: bool,
    ) -> Transfer:
        rank = dist.get_rank(group)
        sent, received = (
            (sum(splits) - splits[rank]) * tensor.shape[1:].numel() * tensor.element_size()
            for splits, tensor in ((send_splits, rows), (recv_splits, out))
        )
        self.traffic.exchanges += 1
        self.traffic.bytes_sent += sent
        self.traffic.bytes_received += received
        begin = time.perf_counter()
        busy_until = max(begin, self._free_at) + self.seconds(max(sent, received))
        self._free_at = busy_until
        work = self._before(out, rows, recv_splits, send_splits, group=group, async_op=async_op)
        return Transfer(work, begin, busy_until + self.latency, self.traffic)


class Transfer:
    r"""An exchange under way; stands in for the handle of :mod:`torch.distributed`.

    Args:
        work: That handle.
        begin: When it began, by :func:`time.perf_counter`.
        due: When the network would be done with it.
        traffic: Where to book it.
    """

    def __init__(self, work: Any, begin: float, due: float, traffic: Traffic) -> None:
        self._work, self._begin, self._due, self._traffic = work, begin, due, traffic
        self._end = float("inf")
        work.get_future().add_done_callback(self._done)

    def _done(self, _: Any) -> None:
        self._end = time.perf_counter()

    def wait(self) -> bool:
        r"""Returns when both the rows are there and the network would have brought them."""
        start = time.perf_counter()
        self._work.wait()
        if (remaining := self._due - time.perf_counter()) > 0:
            time.sleep(remaining)
        there = max(min(self._end, time.perf_counter()), self._due)
        self._traffic.visible_seconds += time.perf_counter() - start
        self._traffic.hidden_seconds += max(0.0, min(there, start) - self._begin)
        return True
