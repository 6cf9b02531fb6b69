r"""What the processes of a gang do: cases, one after the other, until told to stop; see ``gang.py``."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import pickle
import signal
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GLOO_TIMEOUT = 30.0  # seconds until a collective that waits for a peer gives up


@dataclass(frozen=True)
class Worker:
    r"""What a case knows of its place: ``group`` is the process group of the ranks that take part."""

    rank: int
    world_size: int
    group: Any


@dataclass(frozen=True)
class Outcome:
    r"""How a case ended on one rank.

    Either ``value`` is what it returned, or ``error`` holds the exception's type name and message, or
    ``exit_code`` is that of a process which ended (negative: the signal), or ``late`` is set.
    """

    value: Any = None
    error: tuple[str, str] | None = None
    traceback: str = ""
    exit_code: int | None = None
    late: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None and self.exit_code is None and not self.late


def serve(rank: int, port: int, pipe: Connection, stacks: str) -> None:
    r"""The life of a child: cases until told to stop, or until the test process is gone."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=GLOO_TIMEOUT)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    gc.freeze()  # what is imported by now stays: collecting after each case is then cheap
    with Path(stacks).open("w") as file, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        pipe.send_bytes(pickle.dumps("started"))
        while (request := pipe.recv_bytes()) != pickle.dumps(None):
            pipe.send_bytes(_perform(rank, store, request))
            pipe.recv_bytes()  # the word to release
            gc.collect()
            if dist.is_initialized():
                dist.destroy_process_group()
            pipe.send_bytes(pickle.dumps("released"))


def _perform(rank: int, store: Any, request: bytes) -> bytes:
    r"""One case; its pickled :class:`Outcome`."""
    try:
        number, init, world_size, case, args, kwargs = pickle.loads(request)
        group = None
        if init:
            timeout = datetime.timedelta(seconds=GLOO_TIMEOUT)
            prefixed = dist.PrefixStore(f"case_{number}", store)
            dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world_size, timeout=timeout)
            group = dist.group.WORLD
        torch.manual_seed(0)
        return pickle.dumps(Outcome(value=case(Worker(rank, world_size, group), *args, **kwargs)))
    except BaseException as error:  # noqa: BLE001 - it is handed to the test, even SystemExit
        return pickle.dumps(
            Outcome(error=(type(error).__name__, str(error)), traceback=traceback.format_exc())
        )
