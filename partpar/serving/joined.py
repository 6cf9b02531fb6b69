r"""A service over an agent that runs already, whose workers say themselves which part they stand for."""

from __future__ import annotations

from typing import Any

from partpar.errors import ServiceError
from partpar.graph import GraphData
from partpar.serving import agent
from partpar.serving.cache import RowCache
from partpar.serving.owner import Owner
from partpar.serving.remote import RpcTransport
from partpar.serving.service import Service
from partpar.serving.start import CACHE_BYTES

_number = 0


def gather(value: Any, timeout: float) -> dict[str, Any]:
    r"""A number, or tuple of numbers, of every worker of the agent, by the worker's name (collective)."""
    from torch.distributed import rpc

    told: dict[str, Any] = rpc.api._all_gather(value, timeout=timeout)
    return told


def join_service(share: GraphData, timeout: float = 60.0, cache_bytes: int = CACHE_BYTES) -> Service:
    r"""Starts to answer for a share among the workers of the agent that runs (collective). Closing the service leaves the
    agent to who started it.

    Any number of workers may stand for a part, in any order.

    Args:
        share: What this worker answers for.
        timeout: Seconds until a part that does not answer counts as lost.
        cache_bytes: Bound of the rows of other parts that are kept here.

    Raises:
        ServiceError: No agent runs, or nobody stands for some part; on every rank.
    """
    global _number
    from torch.distributed import rpc

    if not agent.is_running():
        raise ServiceError("join_service: expected a running agent, found none; call init_rpc first")
    told = gather((share.part_id, share.num_parts, _number), timeout)
    number = 1 + max(n for _, _, n in told.values())
    _number = number
    names = agent.names()
    own = names.index(rpc.get_worker_info().name)
    workers: list[list[str]] = [[] for _ in range(share.num_parts)]
    for name in names[own:] + names[:own]:  # so that questions to a part are spread over its workers
        if told[name][1] == share.num_parts:
            workers[told[name][0]].append(name)
    missing = [part for part, of_part in enumerate(workers) if not of_part]
    if missing:
        raise ServiceError(f"join_service: expected workers for all {share.num_parts} parts, found none for {missing}")
    owner = Owner(share, RowCache(share, cache_bytes if share.num_parts > 1 else 0))
    transport = _Joined(f"joined-{number}", workers, timeout)
    agent.offer(transport.endpoint, owner.verbs)
    service = Service(owner, transport, timeout)
    gather(0, timeout)  # nobody is asked before all can answer
    return service


class _Joined(RpcTransport):
    """Leaves the agent to who started it."""

    def __init__(self, endpoint: str, workers: list[list[str]], timeout: float) -> None:
        super().__init__(endpoint, workers, timeout)
        self._wait = True

    def abandon(self) -> None:
        self._wait = False

    def close(self) -> None:
        agent.withdraw(self.endpoint, self.timeout, self._wait)
