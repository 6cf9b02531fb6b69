r"""Remote calls by the names of ``torch_geometric.distributed.rpc``. Loaders and samplers do not need them: the service of
a share has its own verbs. They are for scripts that call them."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from partpar.distributed.dist_context import DistContext
from partpar.errors import ServiceError
from partpar.serving import agent
from partpar.serving.joined import gather

_TIMEOUT = 240.0
_LOOK = 3.0  # seconds between two looks at who is still there
_lock = threading.Lock()
_calls: dict[int, RPCCallBase] = {}


def rpc_is_initialized() -> bool:
    r"""Whether this process can be called."""
    return agent.is_running()


def rpc_require_initialized(func: Any) -> Any:
    r"""Has a function raise a :class:`~partpar.errors.ServiceError` unless this process can be called."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        if not agent.is_running():
            raise ServiceError(f"{func.__name__}: expected init_rpc before it, found no agent")
        return func(*args, **kwargs)

    return checked


def init_rpc(
    current_ctx: DistContext,
    master_addr: str,
    master_port: int | str,
    num_rpc_threads: int = 16,
    rpc_timeout: float = _TIMEOUT,
    rpc_worker_names: Any = None,
) -> None:
    r"""Lets processes call each other (collective); nothing, if they can already.

    Args:
        current_ctx: Who this process is.
        master_addr: Where rank 0 is.
        master_port: A free port there. If it is an address of loopback, nobody else can connect.
        num_rpc_threads: Calls that are answered at a time.
        rpc_timeout: Seconds that anything may take.
        rpc_worker_names: Means nothing here, and may be left out.
    """
    if current_ctx is None:
        raise ServiceError("init_rpc: expected a DistContext, found None; make one for this rank")
    if agent.is_running():
        return
    first = current_ctx.global_rank == 0
    if _is_loopback(master_addr) and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    listening = _listen(master_addr, int(master_port)) if first else None
    store = dist.TCPStore(
        master_addr,
        int(master_port),
        current_ctx.global_world_size,
        is_master=first,
        timeout=timedelta(seconds=rpc_timeout),
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    agent.start(
        current_ctx.worker_name,
        current_ctx.global_rank,
        current_ctx.global_world_size,
        store,
        rpc_timeout,
        num_rpc_threads,
    )


def _is_loopback(address: str) -> bool:
    try:
        where = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4]
    except OSError:
        return False
    return ipaddress.ip_address(where[0]).is_loopback


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket that only this machine can reach, if the address is of loopback; torch's own listens everywhere."""
    if not _is_loopback(address):
        return None
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(where)
    listening.listen(1024)
    return listening


def shutdown_rpc(id: str | None = None, graceful: bool = True, timeout: float = _TIMEOUT) -> None:
    r"""Ends what :func:`init_rpc` began; nothing, if it is ended already.

    Args:
        id: Means nothing here.
        graceful: Wait until no rank has a question any more.
        timeout: Seconds to wait at most; not for a rank that has died.
    """
    if not agent.is_running():
        return
    deadline = time.monotonic() + timeout
    # An error that nobody caught ends this process; the others are not waited for.
    graceful = graceful and getattr(sys, "last_value", None) is None
    while graceful and not agent.part_from_all("agent", _LOOK) and time.monotonic() < deadline:
        graceful = all(_answers(name) for name in agent.names())
    agent.stop(_LOOK, wait=graceful)


def _answers(name: str) -> bool:
    """Whether a process is there; one that has ended, or died, is not."""
    from torch.distributed import rpc

    try:
        rpc.rpc_sync(name, _here, timeout=_LOOK)
    except RuntimeError:
        return False
    return True


def _here() -> None:
    return None


@rpc_require_initialized
def global_all_gather(obj: Any, timeout: float | None = None) -> Any:
    r"""Something of every process, by its name (collective)."""
    return gather(obj, _TIMEOUT if timeout is None else timeout)


@rpc_require_initialized
def global_barrier(timeout: float | None = None) -> None:
    r"""Waits for all processes (collective). Unlike the original, it raises if one does not come."""
    gather(0, _TIMEOUT if timeout is None else timeout)


class RPCRouter:
    r"""Names a worker for each part, one after the other.

    Args:
        partition_to_workers: For each part, the names of its workers.
    """

    def __init__(self, partition_to_workers: Sequence[Sequence[str]]) -> None:
        empty = [part for part, names in enumerate(partition_to_workers) if not names]
        if empty:
            raise ServiceError(f"RPCRouter: expected a worker for each part, found none for parts {empty}")
        self.partition_to_workers = [list(names) for names in partition_to_workers]
        self._turn = [0] * len(self.partition_to_workers)

    def get_to_worker(self, partition_idx: int) -> str:
        r"""The next worker of a part."""
        names = self.partition_to_workers[partition_idx]
        turn, self._turn[partition_idx] = self._turn[partition_idx], (self._turn[partition_idx] + 1) % len(names)
        return names[turn]


@rpc_require_initialized
def rpc_partition_to_workers(
    current_ctx: DistContext, num_partitions: int, current_partition_idx: int
) -> list[list[str]]:
    r"""For each part, the names of its workers (collective)."""
    workers: list[list[str]] = [[] for _ in range(num_partitions)]
    for name, part in gather(current_partition_idx, _TIMEOUT).items():
        workers[part].append(name)
    return workers


class RPCCallBase(ABC):
    r"""Something that other processes may call."""

    @abstractmethod
    def rpc_sync(self, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def rpc_async(self, *args: Any, **kwargs: Any) -> Any: ...


@rpc_require_initialized
def rpc_register(call: RPCCallBase) -> int:
    r"""Lets other processes call something, by the number returned; all processes register in the same order."""
    with _lock:
        number = len(_calls)
        _calls[number] = call
    return number


def _call(number: int, how: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return getattr(_calls[number], how)(*args, **kwargs)


@rpc_require_initialized
def rpc_async(worker_name: str, call_id: int, args: Any = None, kwargs: Any = None) -> torch.futures.Future:
    r"""A future of what ``rpc_async`` of something registered returns at another process."""
    from torch.distributed import rpc

    return rpc.rpc_async(worker_name, _call, args=(call_id, "rpc_async", tuple(args or ()), dict(kwargs or {})))


@rpc_require_initialized
def rpc_sync(worker_name: str, call_id: int, args: Any = None, kwargs: Any = None) -> Any:
    r"""What ``rpc_sync`` of something registered returns at another process."""
    from torch.distributed import rpc

    return rpc.rpc_sync(worker_name, _call, args=(call_id, "rpc_sync", tuple(args or ()), dict(kwargs or {})))
