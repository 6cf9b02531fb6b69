r"""Starting the service of a share: alone, or together with the workers of all parts."""

from __future__ import annotations

import torch.distributed as dist

from partpar import exchange
from partpar.errors import ServiceError
from partpar.graph import GraphData
from partpar.serving import agent
from partpar.serving.cache import RowCache
from partpar.serving.owner import Owner
from partpar.serving.remote import RpcTransport
from partpar.serving.service import Service
from partpar.serving.transport import InProcessTransport

CACHE_BYTES = 64 << 20
_number = 0  # of services that this process took part in


def start_service(
    share: GraphData,
    cache_bytes: int = CACHE_BYTES,
    timeout: float = 60.0,
    num_threads: int = 4,
) -> Service:
    r"""Starts to answer for a share, and returns the way to ask for the whole graph (collective).

    The number of workers may be any multiple of the number of parts: ``n`` workers for each part, so rank r stands for
    part ``r // n``. They share the pages of the share's file. Questions to a part are spread over its workers.

    Args:
        share: What this worker answers for; a graph in one part is served in this process alone.
        cache_bytes: Bound of the rows of other parts that are kept here.
        timeout: Seconds until a part that does not answer counts as lost.
        num_threads: How many questions this worker answers at a time, at least 4.

    Raises:
        RouteError: The share, or the number of workers, does not fit the partition; on every rank.
        AgreementError: Workers hold shares of different partitions; on every rank.
    """
    owner = Owner(share, RowCache(share, cache_bytes if share.num_parts > 1 else 0))
    if share.num_parts == 1:
        return Service(owner, InProcessTransport({0: owner.verbs}), timeout)
    group = exchange.own_group()
    rank, world_size = exchange.rank_and_size(group)
    number = _agree(share, group, rank, world_size)
    endpoint = f"service-{number}"
    agent.start_in_default_group(timeout, num_threads)
    names = agent.names()
    each = world_size // share.num_parts
    workers = []
    for part in range(share.num_parts):
        mine = names[part * each : (part + 1) * each]
        first = rank % each
        workers.append(mine[first:] + mine[:first])
    service = Service(owner, _Leased(endpoint, workers, timeout), timeout)
    agent.offer(endpoint, owner.verbs)
    exchange.agree(group, "start_service", {})  # nobody is asked before all can answer
    return service


def _agree(share: GraphData, group: dist.ProcessGroup | None, rank: int, world_size: int) -> int:
    """A number for this service, the same on all ranks, once all fit together."""
    global _number
    wrong = None
    part = share.part
    assert part is not None
    if world_size % share.num_parts:
        wrong = (
            f"start_service: expected a multiple of {share.num_parts} workers for a partition in {share.num_parts} parts, "
            f"found {world_size}"
        )
    elif rank // (world_size // share.num_parts) != share.part_id:
        expected = rank // (world_size // share.num_parts)
        wrong = f"start_service: expected part {expected} on rank {rank} of {world_size}, found part {share.part_id}"
    fields = {
        "number of parts": share.num_parts,
        "run of the partition": int(part.run_id[:15] or "0", 16),
        "_number": _number,
    }
    told = exchange.agree(group, "start_service", fields, wrong)
    if group is None:
        raise ServiceError("start_service: expected a process group for a partition in several parts; call init first")
    _number = 1 + max(fields["_number"] for fields in told)
    return _number


class _Leased(RpcTransport):
    """Holds a lease on this process's agent."""

    def __init__(self, endpoint: str, workers: list[list[str]], timeout: float) -> None:
        super().__init__(endpoint, workers, timeout)
        self._wait = True

    def abandon(self) -> None:
        self._wait = False

    def close(self) -> None:
        agent.stop(min(self.timeout, agent.FAREWELL), wait=self._wait)
        agent.withdraw(self.endpoint)

