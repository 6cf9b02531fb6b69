r"""Processes that start their agents await each other in bounded time; torch alone would wait for 24 days."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from partpar.errors import PeerLostError
from partpar.serving.arrival import await_all, bounded


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)


def unknown(rank: int, stopped: bool) -> None:
    return None


def test_all_come(store: dist.Store) -> None:
    late = threading.Timer(0.3, await_all, (store.clone(), "worker-1", 1, 2, 20.0, unknown))
    late.start()
    await_all(store, "worker-0", 0, 2, 20.0, unknown)
    late.join(20)
    assert not late.is_alive()


def test_who_does_not_come_is_named_at_the_timeout(store: dist.Store) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"worker-0 awaited 3 processes .* for 0\.\d s: rank 1 did not come; rank 2 is stopped"):
        await_all(store, "worker-0", 0, 3, 0.5, lambda rank, late: "rank 2 is stopped" if rank == 2 and late else None)
    assert 0.5 <= time.monotonic() - begin < 5


def test_who_is_gone_is_named_at_once(store: dist.Store) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 is gone"):
        await_all(store, "worker-0", 0, 2, 60.0, lambda rank, late: "rank 1 is gone")
    assert time.monotonic() - begin < 5


def test_torch_waits_no_longer_than_it_may(store: dist.Store) -> None:
    r"""For one that came, and ended then. In a thread: where the bound is not heeded, this would wait for 24 days."""
    from torch.distributed.rpc import backend_registry, constants

    before, told = constants.DEFAULT_PROCESS_GROUP_TIMEOUT, []

    def connect() -> None:
        with bounded(0.5), pytest.raises(RuntimeError) as error:
            backend_registry._init_process_group(store.clone(), 0, 2)
        told.append(str(error.value))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(15)
    assert not thread.is_alive()
    assert "timeout after 500ms" in told[0]
    assert before == constants.DEFAULT_PROCESS_GROUP_TIMEOUT
