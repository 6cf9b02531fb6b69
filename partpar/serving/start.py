r"""Starting the service of a share: alone, or together with the workers of all parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from partpar import exchange
from partpar.agreement import digest
from partpar.errors import ServiceError
from partpar.graph import Frame, GraphData
from partpar.serving import agent
from partpar.serving.cache import RowCache
from partpar.serving.owner import Owner
from partpar.serving.remote import RpcTransport
from partpar.serving.server import ServerProcess, server_name
from partpar.serving.service import Service
from partpar.serving.transport import InProcessTransport

CACHE_BYTES = 64 << 20
_number = 0  # of services that this process took part in


def start_service(
    share: GraphData,
    cache_bytes: int = CACHE_BYTES,
    timeout: float = 60.0,
    num_threads: int = 4,
    servers: str | Path | None = None,
) -> Service:
    r"""Starts to answer for a share, and returns the way to ask for the whole graph (collective).

    The number of workers may be any multiple of the number of parts: ``n`` workers for each part, so rank r stands for
    part ``r // n``. They share the pages of the share's file. Questions to a part are spread over its workers.

    Args:
        share: What this worker answers for; a graph in one part is served in this process alone.
        cache_bytes: Bound of the rows of other parts that are kept here.
        timeout: Seconds until a part that does not answer counts as lost.
        num_threads: How many questions this worker answers at a time, at least 4.
        servers: The partition's folder, to have a process of its own answer for each part; by default the workers
            answer, on threads.

    Raises:
        RouteError: The share, or the number of workers, does not fit the partition; on every rank.
        AgreementError: Workers hold shares of different partitions; on every rank.
    """
    owner = Owner(share, RowCache(share, cache_bytes if share.num_parts > 1 else 0))
    if share.num_parts == 1:
        return Service(owner, InProcessTransport({0: owner.verbs}), timeout)
    group = exchange.own_group()
    rank, world_size = exchange.rank_and_size(group)
    if group is None:
        raise ServiceError(
            f"start_service: expected a process group of the workers of {share.num_parts} parts, found this process alone; "
            f"start them with torchrun and call init first"
        )
    number = _agree(share, group, rank, world_size)
    endpoint = f"service-{number}"
    each, num_servers = world_size // share.num_parts, 0 if servers is None else share.num_parts
    server: ServerProcess | None = None
    if servers is None:
        agent.start_in_default_group(timeout, num_threads)
        workers = _workers(agent.names(), share.num_parts, rank)
    else:
        workers = _workers([agent.worker_name(r) for r in range(world_size)], share.num_parts, rank)
        workers = [[server_name(part), *names] for part, names in enumerate(workers)]
        if rank % each == 0:
            server = ServerProcess(
                servers,
                share.part_id,
                endpoint,
                workers,
                rank=world_size + share.part_id,
                world_size=world_size + num_servers,
                token=agent.next_prefix(),
                timeout=timeout,
                num_threads=num_threads,
            )
        agent.start_in_default_group(timeout, num_threads, num_servers)
    service = Service(owner, _Leased(endpoint, workers, timeout, server), timeout)
    agent.offer(endpoint, owner.verbs)
    exchange.agree(group, "start_service", {})  # nobody is asked before all can answer
    return service


def _workers(names: list[str], num_parts: int, rank: int) -> list[list[str]]:
    """Who stands for each part, the one that this rank asks first: so questions are spread."""
    each = len(names) // num_parts
    first = rank % each
    parts = (names[part * each : (part + 1) * each] for part in range(num_parts))
    return [mine[first:] + mine[:first] for mine in parts]


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
        "attributes, their dtypes and widths": _schema(share),
        "_number": _number,
    }
    told = exchange.agree(group, "start_service", fields, wrong)
    _number = 1 + max(fields["_number"] for fields in told)
    return _number


def _schema(share: GraphData) -> int:
    """What attributes there are. A share's file says so of those that were cut; others may have been added to it."""
    frames: dict[Any, Frame] = {t: share.node(t) for t in share.node_types}
    frames |= {t: share.edge(t) for t in share.edge_types}
    facts = (
        (str(kind), name, frame[name].dtype, tuple(frame[name].shape[1:]))
        for kind, frame in frames.items()
        for name in frame
        if name not in ("ids", "raw_ids")
    )
    return digest(*sorted(facts, key=str))


class _Leased(RpcTransport):
    """Holds a lease on this process's agent."""

    def __init__(
        self, endpoint: str, workers: list[list[str]], timeout: float, server: ServerProcess | None
    ) -> None:
        super().__init__(endpoint, workers, timeout)
        self._wait, self._server = True, server

    def abandon(self) -> None:
        self._wait = False

    def close(self) -> None:
        together = agent.withdraw(self.endpoint, self.timeout, self._wait)
        if self._server is not None and together:
            self._server.say_end()
        agent.stop(self.timeout, wait=together)
        if self._server is not None:
            self._server.close()

