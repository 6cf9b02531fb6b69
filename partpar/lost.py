r"""Who is awaited: what to say when a rank does not come to a collective, or was torn out of one.

gloo's own errors name a port or nobody. Here every rank that gives up says so in the store at which the ranks met, and
looks who has not: whether that rank failed (it left its error there), or whether its process is gone or stopped, as far
as that can be seen from this machine. All of it happens after the fault; a step that goes well pays nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from partpar.errors import AgreementError, PartparError, PeerLostError, RankLostError

GRACE = 3.0  # seconds that the others get to give up as well
_PATIENCE = 2.0  # seconds that the store gets for its answers beyond that: its process may be the one that is stopped
_PAUSE = 0.05
_OF_NETWORK = re.compile(r"/gloo/|NCCL|closed by peer|reset by peer|Timed out waiting")
_NOISE = re.compile(r"^\[[^\]]*\.\w+:\d+\]\s*|\.? This is typically caused.*$", re.DOTALL)
_HOME, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)
_CARRIERS = {f"{_HOME}/{name}.py" for name in ("exchange", "transfer", "agreement", "groups", "lost")}


@dataclass(frozen=True)
class _Process:
    """Where a rank runs, as seen from all machines."""

    host: str
    pid: int

    @classmethod
    def own(cls) -> _Process:
        try:
            space = str(Path("/proc/self/ns/pid").readlink())  # containers of one machine count processes apart
        except OSError:
            space = ""
        return cls(socket.gethostname() + space, os.getpid())

    def state(self) -> str:
        r"""``"gone"``, ``"stopped"``, ``"runs"`` or, of another machine, ``"elsewhere"``."""
        if self.host != _Process.own().host or not Path("/proc/self/stat").exists():
            return "elsewhere"
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "gone"
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "runs")


_processes: dict[int, _Process] = {}  # by rank in the default group
_faults: WeakKeyDictionary[ProcessGroup, Counter[str]] = WeakKeyDictionary()


def introduce(group: ProcessGroup) -> None:
    r"""Has the ranks of a group know each other's processes (collective)."""
    store, own = dist.distributed_c10d._get_default_store(), _Process.own()
    store.set(f"partpar/process/{dist.get_rank()}", json.dumps([own.host, own.pid]))
    for rank in dist.get_process_group_ranks(group):
        host, pid = json.loads(store.get(f"partpar/process/{rank}"))
        _processes[rank] = _Process(str(host), int(pid))


def leave_word(error: BaseException) -> None:
    r"""Tells the other ranks why this one ends, unless it ends because of them."""
    secondary = isinstance(error, (RankLostError, PeerLostError))
    if secondary or (isinstance(error, SystemExit) and not error.code) or not dist.is_initialized():
        return
    text = f"{type(error).__name__}: {error}"[:500]
    _within(_PATIENCE, lambda: _store().set(f"partpar/failed/{dist.get_rank()}", text))


def is_of_network(error: BaseException) -> bool:
    r"""Whether an error is what torch raises where a peer is gone or late, and not yet one of ours."""
    return (
        isinstance(error, RuntimeError) and not isinstance(error, PartparError) and bool(_OF_NETWORK.search(str(error)))
    )


def blame(
    error: BaseException, group: ProcessGroup, since: float | None, call: str | None = None, matter: str = "training"
) -> BaseException:
    r"""What to raise instead of an error of torch's.

    Args:
        error: What torch raised.
        group: The group whose ranks were awaited.
        since: When waiting began, by :func:`time.monotonic`, if that is known.
        call: What they were awaited in; by default it is read off the stack.
        matter: What ranks do one after the other, so that who gives up can be told from who gave up before: threads that
            work beside the training have a matter of their own.

    Returns:
        :class:`~partpar.errors.RankLostError`, which names the ranks and what became of them;
        :class:`~partpar.errors.AgreementError` where all ranks are there, in different calls; or :obj:`error` itself
        where it tells of no network.
    """
    if not is_of_network(error):
        return error
    waited = "" if since is None else f" for {time.monotonic() - since:.1f} s"
    call = where() if call is None else call
    inquiry = _Inquiry(group, call, matter)
    answered = _within(GRACE + _PATIENCE, inquiry.run)
    rank, calls = dist.get_rank(group), inquiry.calls
    if answered and len(calls) == dist.get_world_size(group) and len(set(calls.values())) > 1:
        told = ", ".join(f"rank {r} in {calls[r]}" for r in sorted(calls))
        return AgreementError(
            f"ranks are in different calls: {told}; every rank must make the same calls in the same order"
        )
    cause = _NOISE.sub("", str(error).strip().splitlines()[0])
    return RankLostError(f"rank {rank} awaited others{waited} in {call}: {inquiry.verdict(answered)} ({cause})")


def fate(rank: int, stopped: bool = True) -> str | None:
    r"""What is known to have befallen a rank of the default group; :obj:`None` where nothing is.

    Args:
        rank: Which.
        stopped: Whether to tell as well that its process is stopped: it may go on.
    """
    said: list[str] = []

    def ask() -> None:
        try:
            if _store().check([f"partpar/failed/{rank}"]):
                said.append(_store().get(f"partpar/failed/{rank}").decode())
        except RuntimeError:  # the store went with its process
            return

    if not dist.is_initialized():
        return None
    _within(_PATIENCE, ask)
    process = _processes.get(rank)
    if not stopped and process is not None and process.state() == "stopped":
        process = None
    return _fate(rank, process, said[0] if said else None)


def _fate(rank: int, process: _Process | None, failure: str | None) -> str | None:
    if failure is not None:
        return f"rank {rank} failed with {failure}"
    state = "elsewhere" if process is None else process.state()
    if process is None or state not in ("gone", "stopped"):
        return None
    how = "is gone: it was killed or has ended" if state == "gone" else "is stopped"
    return f"rank {rank} (process {process.pid}) {how}"


class awaiting:
    r"""Within this context ranks of a group are awaited; what torch raises there is raised as what :func:`blame` makes
    of it."""

    __slots__ = ("_group", "_since", "_what")

    def __init__(self, group: ProcessGroup | None, call: str | None = None, matter: str = "training") -> None:
        self._group, self._what = group, (call, matter)

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._group is not None:
            found = blame(error, self._group, self._since, *self._what)
            if found is not error:
                raise found from error


class _Inquiry:
    """Asks what became of all ranks of a group. It has what it knows by then where the store falls silent."""

    def __init__(self, group: ProcessGroup, call: str, matter: str) -> None:
        # Of all groups together: ranks in different calls may be in such of different groups.
        world = dist.group.WORLD
        assert isinstance(world, ProcessGroup)
        faults = _faults.setdefault(world, Counter())
        faults[matter] += 1
        self.prefix = f"partpar/gave_up/{matter}/{faults[matter]}"
        self.call, self.rank = call, dist.get_rank(group)
        self.ranks = dist.get_process_group_ranks(group)
        self.calls = {self.rank: call}
        self.failed: dict[int, str] = {}
        self.store_error: RuntimeError | None = None

    def run(self) -> None:
        until = time.monotonic() + GRACE
        try:
            store = _store()
            store.set(f"{self.prefix}/{self.ranks[self.rank]}", self.call)
            while time.monotonic() < until:
                for rank, named in enumerate(self.ranks):
                    if rank not in self.calls and store.check([f"{self.prefix}/{named}"]):
                        self.calls[rank] = store.get(f"{self.prefix}/{named}").decode()
                    if rank not in self.failed and store.check([f"partpar/failed/{named}"]):
                        self.failed[rank] = store.get(f"partpar/failed/{named}").decode()
                if all(r in self.calls or self.fate(r) is not None for r in range(len(self.ranks))):
                    break
                time.sleep(_PAUSE)
            # Who keeps the store must not end before the others have read.
            store.set(f"{self.prefix}/read/{self.ranks[self.rank]}", "1")
            read = [f"{self.prefix}/read/{self.ranks[rank]}" for rank in self.calls]
            while time.monotonic() < until and not store.check(read):
                time.sleep(_PAUSE)
        except RuntimeError as error:  # the store went with its process
            self.store_error = error

    def fate(self, rank: int) -> str | None:
        """What is known to have befallen a rank, unless it gave up because of others; None where nothing is."""
        if rank in self.calls and rank not in self.failed:
            return None
        return _fate(rank, _processes.get(self.ranks[rank]), self.failed.get(rank))

    def verdict(self, answered: bool) -> str:
        """Names those to blame: who is known to have failed, else all who said nothing."""
        fates = [fate for rank in range(len(self.ranks)) if rank != self.rank and (fate := self.fate(rank)) is not None]
        if fates:
            return "; ".join(fates)
        if not answered or (self.store_error is not None and len(self.calls) < len(self.ranks)):
            return "the process that keeps the ranks' store, rank 0 or the launcher, is gone or does not answer"
        silent = [rank for rank in range(len(self.ranks)) if rank not in self.calls]
        if silent:
            return "; ".join(f"rank {rank} has not come, and has not given up either" for rank in silent)
        return "every rank gave up in this call; look for what came between their machines"


def where() -> str:
    r"""The call that the current exchange is part of: the function of partpar that began it, and the user's line."""
    frame, name, room = sys._getframe(1), "", ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_HOME + os.sep):
            if code.co_name == "backward":
                name, room = "backward", "autograd"
            elif code.co_filename == room or not (room or code.co_filename in _CARRIERS):
                # Of the first module that is no mere carrier, the outermost function: what its caller knows.
                name, room = getattr(code, "co_qualname", code.co_name), code.co_filename
        elif not code.co_filename.startswith((_TORCH + os.sep, "<")):
            return f"{name or 'an exchange'} at {Path(code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return name or "an exchange"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _within(seconds: float, work: Any) -> bool:
    """Whether some work was done in time: a store whose process is stopped never answers."""
    thread = threading.Thread(target=work, name="partpar-inquiry", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
