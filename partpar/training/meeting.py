r"""The store at which workers meet to make their process group."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from partpar.training.environment import Launch

_BACKLOG = 2048


def meeting_store(launch: Launch, timeout: float) -> dist.Store | None:
    r"""The store of this start of the workers; :obj:`None` where torch is to make it.

    Args:
        launch: What the environment says; ``MASTER_ADDR`` and ``MASTER_PORT`` stand in it.
        timeout: Seconds that the others may take to come.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start != "0":
        # Workers that torchrun starts anew meet at the store of those before, and must not find their addresses there.
        patience = timedelta(seconds=timeout)
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=patience))
        return dist.PrefixStore(f"start_{start}", store)
    if launch.one_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return _narrow_store(launch, timeout)
    return None


def _narrow_store(launch: Launch, timeout: float) -> dist.Store:
    r"""A store that listens at ``MASTER_ADDR`` alone. One that torch makes listens on all addresses of the machine, and
    nobody need be known to reach it."""
    host, port, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launch.rank == 0
    line = None
    if first:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            line = socket.create_server(address[:2], family=family, backlog=_BACKLOG).detach()
        except OSError:  # torch finds the same, unless it is its own server of an earlier group in this process
            line = None
    return dist.TCPStore(
        host,
        port,
        launch.world_size,
        is_master=first,
        timeout=timedelta(seconds=timeout),
        multi_tenant=first,
        master_listen_fd=line,
    )
