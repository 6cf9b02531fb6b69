r"""This process's one agent of :mod:`torch.distributed.rpc`, and what may be asked of it by name.

torch has one agent in a process. It is started over a store that the processes share already, so no port is picked by
hand; it is leased by every service of the process and stopped with the last one, in bounded time even where a peer is
dead.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
import warnings
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar.errors import ServiceError
from partpar.serving.outbox import Outbox
from partpar.serving.transport import Tensors, Values, Verbs

MIN_THREADS = 4  # with fewer, two parts that ask each other can run out of threads that answer
FAREWELL = 15.0  # seconds to wait for those who still ask

_lock = threading.RLock()
_endpoints: dict[str, Verbs] = {}
_outbox = Outbox()
_leases = 0
_store: dist.Store | None = None
_starts: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()


def is_running() -> bool:
    r"""Whether this process has an agent, whoever started it."""
    from torch.distributed import rpc

    return bool(rpc.api._is_current_rpc_agent_set())


def start(
    name: str, rank: int, world_size: int, store: dist.Store, timeout: float = 60.0, num_threads: int = 8
) -> None:
    r"""Starts the agent (collective), or takes one more lease on the one that runs.

    Args:
        name: This process's name, different from all others.
        rank: Its number.
        world_size: How many processes take part.
        store: One that all of them share, and that nobody started an agent over before: prefix it.
        timeout: Seconds that anything may take.
        num_threads: How many questions are answered at a time.
    """
    global _leases, _store
    from torch.distributed import autograd, rpc

    with _lock:
        if is_running():
            _leases += 1
            return
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=max(num_threads, MIN_THREADS),
            rpc_timeout=timeout,
            _transports=["uv"],
            _channels=["basic"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, about how it gathers names
            autograd._init(rank)
            try:
                rpc._init_rpc_backend(
                    rpc.backend_registry.BackendType.TENSORPIPE, store, name, rank, world_size, options
                )
            except RuntimeError as error:
                raise ServiceError(
                    f"{name}: expected {world_size} processes to start their remote service within {timeout:g} s, "
                    f"found {error}"
                ) from error
        _leases, _store = 1, store


def start_in_default_group(timeout: float, num_threads: int) -> None:
    r"""Starts the agent over the store of the default process group (collective)."""
    world = dist.group.WORLD
    assert isinstance(world, ProcessGroup)
    number = _starts.get(world, 0)
    if not is_running():
        _starts[world] = number + 1
    store = dist.PrefixStore(f"partpar_agent_{number}", dist.distributed_c10d._get_default_store())
    rank = dist.get_rank()
    start(f"worker {rank}".replace(" ", "-"), rank, dist.get_world_size(), store, timeout, num_threads)


def stop(timeout: float = FAREWELL, wait: bool = True) -> None:
    r"""Gives a lease back; with the last one, stops the agent.

    Args:
        timeout: Seconds to wait for the others to have no more questions.
        wait: Whether to wait for them at all; not after a failure.
    """
    global _leases, _store
    from torch.distributed import rpc

    with _lock:
        _leases -= 1
        if _leases > 0 or not is_running():
            return
        _leases = 0
        store, _store = _store, None
        together = wait and store is not None and _say_farewell(store, timeout)
        with contextlib.suppress(RuntimeError):  # a peer that went meanwhile: nothing is left to ask it
            rpc.shutdown(graceful=together, timeout=timeout)
        if is_running():
            rpc.shutdown(graceful=False)
        _outbox.clear()


def _say_farewell(store: dist.Store, timeout: float) -> bool:
    """Whether all said that they have no more questions."""
    infos = _infos()
    try:
        store.set(f"farewell_{_own_id()}", "1")
        store.wait([f"farewell_{info.id}" for info in infos], timedelta(seconds=timeout))
    except RuntimeError:  # DistStoreError and DistNetworkError among them: somebody is gone, or late
        return False
    return True


def _infos() -> list[Any]:
    from torch.distributed import rpc

    return sorted(rpc.api._get_current_rpc_agent().get_worker_infos(), key=lambda info: info.id)


def _own_id() -> int:
    from torch.distributed import rpc

    return int(rpc.get_worker_info().id)


def names() -> list[str]:
    r"""The names of all processes, by rank."""
    return [info.name for info in _infos()]


def offer(endpoint: str, verbs: Verbs) -> None:
    r"""Lets other processes ask :obj:`verbs` under a name."""
    if endpoint in _endpoints:
        raise ServiceError(f"expected a new endpoint, found {endpoint!r}, which is taken")
    _endpoints[endpoint] = verbs


def withdraw(endpoint: str) -> None:
    r"""Takes a name back."""
    _endpoints.pop(endpoint, None)


def serve(endpoint: str, verb: str, tensors: Tensors, values: Values) -> tuple[Tensors, Values]:
    r"""Runs where a question arrives; an error travels as text, for an exception would have to be unpickled."""
    try:
        if endpoint not in _endpoints:
            raise ServiceError(f"expected an endpoint of {sorted(_endpoints)}, found {endpoint!r}; it may be closed")
        return _outbox.hold(_endpoints[endpoint].answer(verb, tensors, values))
    except Exception:  # noqa: BLE001 - it is raised where the answer is awaited
        return {}, {"error": traceback.format_exc()}


def piece(ticket: int, low: int, high: int) -> Tensor:
    r"""Runs where a large answer waits to be fetched piece by piece."""
    return _outbox.take(ticket, low, high)


def ask(name: str, endpoint: str, verb: str, tensors: Tensors, values: Values, timeout: float) -> torch.futures.Future:
    r"""A future of what :func:`serve` returns at the process of that name."""
    from torch.distributed import rpc

    return rpc.rpc_async(name, serve, args=(endpoint, verb, tensors, values), timeout=timeout)


def ask_piece(name: str, ticket: int, low: int, high: int, timeout: float) -> torch.futures.Future:
    r"""A future of what :func:`piece` returns there."""
    from torch.distributed import rpc

    return rpc.rpc_async(name, piece, args=(ticket, low, high), timeout=timeout)
