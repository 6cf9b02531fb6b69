r"""This process's one agent of :mod:`torch.distributed.rpc`, and what may be asked of it by name.

torch has one agent in a process. It is started over a store that the processes share already, so no port is picked by
hand; it is leased by every service of the process and stopped with the last one, in bounded time even where a peer is
dead.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
import warnings
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import lost
from partpar.errors import ServiceError
from partpar.serving import arrival
from partpar.serving.outbox import Outbox
from partpar.serving.transport import Tensors, Values, Verbs

MIN_THREADS = 4  # with fewer, two parts that ask each other can run out of threads that answer
FAREWELL = 15.0  # seconds to wait for those who still ask
_LINGER = 3.0  # seconds that the first process stays for the others to be through with the store
_LOOK = 1.0  # seconds after which to look whether they still run

_lock = threading.RLock()
_endpoints: dict[str, Verbs] = {}
_outbox = Outbox()
_leases = 0
_store: dist.Store | None = None
_given: dist.Store | None = None  # what that is a connection to; it may be the server, which ends with it
_ended = 0  # agents of this process that were ended together with all others
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

    Raises:
        PeerLostError: One of them is gone, or did not come in time.
        ServiceError: They came, but could not be connected.
    """
    global _leases, _store, _given
    from torch.distributed import autograd, rpc

    with _lock:
        if is_running():
            _leases += 1
            return
        _given = store
        if hasattr(store, "clone"):  # so that its calls may be bounded otherwise than the others'
            store = store.clone()
        known = name == worker_name(rank)  # else this process has no rank in the default group, or another one
        arrival.await_all(store, name, rank, world_size, timeout, lost.fate if known else lambda *_: None)
        # It listens where the process group does: on loopback, for workers of one machine.
        if "GLOO_SOCKET_IFNAME" in os.environ:
            os.environ.setdefault("TP_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])
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
                backend: Any = rpc.backend_registry.BackendType
                with arrival.bounded(timeout):
                    rpc._init_rpc_backend(backend.TENSORPIPE, store, name, rank, world_size, options)
            except RuntimeError as error:
                raise ServiceError(
                    f"{name}: expected {world_size} processes to start their remote service within {timeout:g} s, "
                    f"found {error}"
                ) from error
        _leases, _store = 1, store
        store.set(f"ended_{rank}", str(_ended))


def start_in_default_group(timeout: float, num_threads: int, num_servers: int = 0) -> str:
    r"""Starts the agent over the store of the default process group (collective).

    Args:
        timeout: Seconds that anything may take.
        num_threads: How many questions are answered at a time.
        num_servers: Processes beside the group's that take part, with the ranks behind its.

    Returns:
        The prefix in the store.
    """
    prefix = next_prefix()
    if not is_running():
        _starts[_world()] += 1
    elif num_servers:
        raise ServiceError("expected no service in this process before one with servers, found one; close it first")
    store = dist.PrefixStore(prefix, shared_store() if num_servers else _default_store())
    rank, world_size = dist.get_rank(), dist.get_world_size() + num_servers
    start(worker_name(rank), rank, world_size, store, timeout, num_threads)
    return prefix


def next_prefix() -> str:
    r"""What the next start in the default group will prefix its keys in the store with; the same on all ranks."""
    return f"partpar_agent_{_starts.setdefault(_world(), 0)}"


def shared_store() -> dist.TCPStore:
    r"""The store below the default process group's, which other processes can reach by host and port."""
    store = _default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        raise ServiceError(
            f"expected a process group over a TCPStore, as torchrun makes it, found {type(store).__name__}; "
            f"start without servers"
        )
    return store


def _default_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert isinstance(world, ProcessGroup)
    return world


def stop(timeout: float = FAREWELL, wait: bool = True) -> None:
    r"""Gives a lease back; with the last one, stops the agent.

    Args:
        timeout: Seconds to wait for the others to have no more questions.
        wait: Whether to wait for them at all; not after a failure.
    """
    global _leases, _store, _given
    from torch.distributed import rpc

    with _lock:
        _leases -= 1
        if _leases > 0 or not is_running():
            return
        _leases = 0
        if wait and part_from_all("agent", timeout):
            _end_together(min(timeout, FAREWELL))
        _store = _given = None
        # torch's own way to wait for the others is not bounded.
        rpc.shutdown(graceful=False)
        _outbox.clear()


def _end_together(timeout: float) -> None:
    """Has torch's agent know that connections will close, once all have come; else it warns of each that does.

    It numbers such meetings through a process's life, so all processes must have had as many before.
    """
    global _ended
    from torch.distributed import rpc

    if not hasattr(_store, "clone"):
        return
    assert _store is not None
    _store.set_timeout(timedelta(seconds=timeout))
    with contextlib.suppress(RuntimeError):  # the store's errors: somebody did not come
        if len({_store.get(f"ended_{info.id}") for info in _infos()}) == 1:
            rpc.api._get_current_rpc_agent().join(shutdown=True, timeout=timeout)
            _ended += 1
        _store.set(f"left_{_own_id()}", "1")
        if _own_id() == 0:  # where the store most often is
            _store.wait([f"left_{info.id}" for info in _infos()], timedelta(seconds=min(timeout, _LINGER)))


def say_farewell(what: str) -> None:
    r"""Tells the others that this process has no more questions to an endpoint, or to the ``"agent"`` at all."""
    if _store is not None:
        with contextlib.suppress(RuntimeError):  # the store went with its process
            _store.set(f"farewell_{what}_{_own_id()}", "1")


def part_from_all(what: str, timeout: float = FAREWELL) -> bool:
    r"""Says farewell and waits for that of all others; whether all came before one was gone or the time was up."""
    if _store is None:
        return True
    say_farewell(what)
    deadline, missing = time.monotonic() + timeout, _infos()
    while missing:
        try:
            missing = [info for info in missing if not _store.check([f"farewell_{what}_{info.id}"])]
            left = deadline - time.monotonic()
            if left <= 0 or any(lost.fate(rank) for info in missing if (rank := rank_of(info.name)) is not None):
                break
            _store.wait([f"farewell_{what}_{info.id}" for info in missing], timedelta(seconds=min(_LOOK, left)))
        except dist.DistNetworkError:  # the store went with its process
            return False
        except RuntimeError:  # among the store's errors is its timeout
            time.sleep(0.01)
    return not missing


def _infos() -> list[Any]:
    from torch.distributed import rpc

    return sorted(rpc.api._get_current_rpc_agent().get_worker_infos(), key=lambda info: info.id)


def _own_id() -> int:
    from torch.distributed import rpc

    return int(rpc.get_worker_info().id)


def worker_name(rank: int) -> str:
    r"""What a worker of the default group is called, unless somebody else started its agent."""
    return f"worker-{rank}"


def rank_of(name: str) -> int | None:
    r"""The rank that :func:`worker_name` made a name of; :obj:`None` for servers and agents that others started."""
    kind, _, number = name.partition("-")
    return int(number) if kind == "worker" and number.isdecimal() else None


def names() -> list[str]:
    r"""The names of all processes, by rank."""
    return [info.name for info in _infos()]


def offer(endpoint: str, verbs: Verbs) -> None:
    r"""Lets other processes ask :obj:`verbs` under a name."""
    if endpoint in _endpoints:
        raise ServiceError(f"expected a new endpoint, found {endpoint!r}, which is taken")
    _endpoints[endpoint] = verbs


def withdraw(endpoint: str, timeout: float = FAREWELL, wait: bool = True) -> bool:
    r"""Takes a name back, once nobody has a question to it any more.

    Args:
        endpoint: The name.
        timeout: Seconds to wait for the others.
        wait: Whether to wait for them at all; not after a failure.

    Returns:
        Whether all others have come to that point.
    """
    together = wait and part_from_all(endpoint, timeout)
    _endpoints.pop(endpoint, None)
    return together


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
