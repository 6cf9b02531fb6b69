r"""Several real processes for one test, with a deadline on everything.

A :class:`Gang` keeps its processes for a whole session, since starting one costs seconds. Every case gets a
gloo process group of its own, of exactly the ranks that take part, over a store that the test process keeps:
so a case sees the world that a user's script sees, and nothing of an earlier case is left to meet.

A case that raises on some ranks breaks the others out of their collectives when the group is torn down, and
the gang stays usable. A process that died, or did not end in time, is killed, and the gang starts afresh.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from gang_child import Outcome, Worker, serve

__all__ = ["Gang", "GangError", "Outcome", "Worker", "launch"]

GRACE = 3.0  # seconds that the other ranks get to report by themselves once one has failed
START_TIMEOUT = 120.0  # seconds for a new process to import torch and report


class GangError(AssertionError):
    r"""A case failed on some rank; the message holds the traceback of the rank that failed first."""


class _Child:
    r"""One process and the pipe to it."""

    def __init__(self, rank: int, port: int, folder: Path, env: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.rank = rank
        self.released = False
        self.stacks = folder / f"stacks_{rank}_{time.monotonic_ns()}.txt"
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(rank, port, other, str(self.stacks)), name=f"rank {rank}", daemon=True
        )
        with _environment(env):
            self.process.start()
        other.close()  # so that the pipe ends when the child does

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead child is noticed when its answer is read
            self.pipe.send_bytes(pickle.dumps(message))

    def release(self) -> None:
        r"""Has it tear down its group, once a case; until then others may use it."""
        if not self.released:
            self.released = True
            self.send("release")

    def receive(self) -> Any:
        r"""Raises :class:`EOFError` when the process has ended."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except ConnectionResetError as error:
            raise EOFError from error

    def exit_code(self) -> int:
        self.process.join(10)
        if self.process.exitcode is None:  # it closed its pipe and lives on
            self.kill()
        return int(self.process.exitcode or 0)

    def stack(self) -> str:
        r"""Where the process stands right now, all threads."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.1)
            if self.stacks.exists() and self.stacks.stat().st_size:
                time.sleep(0.1)
                return self.stacks.read_text()
        return "(it did not answer SIGUSR1)"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Gang:
    r"""``size`` processes that run cases.

    Args:
        size: How many processes, hence the largest world size of a case.
        env: Environment variables for them, beside those of this process.
        init: Whether the process group is made before the case runs. Without it, the environment is the one
            that ``torchrun`` would set, for ``init_process_group()`` in the case itself.
    """

    def __init__(self, size: int = 4, env: dict[str, str] | None = None, init: bool = True) -> None:
        self.size = size
        self.init = init
        self._env = dict(env or {})
        self._children: list[_Child] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gang-")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._number = 0

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, case: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, **kwargs: Any
    ) -> list:
        r"""Calls ``case(worker, *args, **kwargs)`` on ``world_size`` ranks and returns what each returned.

        Raises:
            GangError: A rank raised, ended or took longer than ``timeout`` seconds.
        """
        outcomes = self.outcomes(case, world_size, *args, timeout=timeout, **kwargs)
        return [outcome.value for outcome in _all_ok(outcomes, case)]

    def run_expecting_errors(
        self, case: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, **kwargs: Any
    ) -> list[tuple[str, str] | None]:
        r"""As :meth:`run`, but returns each rank's exception as (type name, message), or ``None``."""
        outcomes = self.outcomes(case, world_size, *args, timeout=timeout, **kwargs)
        _all_ok({rank: o for rank, o in outcomes.items() if o.error is None}, case)
        return [outcomes[rank].error for rank in range(world_size)]

    def outcomes(
        self,
        case: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 60,
        grace: float = GRACE,
        **kwargs: Any,
    ) -> dict[int, Outcome]:
        r"""As :meth:`run`, but returns the outcome of every rank, in the order in which they ended.

        Args:
            grace: Seconds after the first failure until the failed ranks give up their connections.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"a case runs on 1 to {self.size} ranks, not {world_size}")
        self._start()
        self._number += 1
        children = self._children[:world_size]
        deadline = time.monotonic() + timeout
        for child in children:
            child.released = False
            child.send((self._number, self.init, world_size, case, args, kwargs))
        outcomes = self._collect(children, deadline, grace)
        if any(o.late or o.exit_code is not None for o in outcomes.values()) or not self._release(children):
            self._kill()
        return outcomes

    def close(self) -> None:
        r"""Ends the processes.

        Raises:
            GangError: One did not end by itself, or not with exit code 0.
        """
        children, self._children = self._children, []
        for child in children:
            child.send(None)
        codes = {}
        for child in children:
            child.process.join(20)
            codes[child.rank] = (
                "none within 20 s" if child.process.exitcode is None else child.process.exitcode
            )
            child.kill()
        self._folder.cleanup()
        if any(codes.values()):
            raise GangError(f"exit codes of the ranks at the end, expected 0: {codes}")

    def _start(self) -> None:
        if self._children:
            return
        env = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(self._store.port), "LOCAL_WORLD_SIZE": str(self.size)}
        env |= {"WORLD_SIZE": str(self.size), "TORCHELASTIC_RESTART_COUNT": "0"}
        if any(name == "lo" for _, name in socket.if_nameindex()):
            env["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine's own name resolves to
        folder = Path(self._folder.name)
        for rank in range(self.size):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._children.append(_Child(rank, self._store.port, folder, env | ranks | self._env))
        for child in self._children:  # the time of starting is nobody's deadline
            if not child.pipe.poll(START_TIMEOUT):
                self._kill()
                raise GangError(f"rank {child.rank} did not start within {START_TIMEOUT:.0f} s")
            try:
                child.receive()
            except EOFError:
                code = child.exit_code()
                self._kill()
                raise GangError(f"rank {child.rank} ended with exit code {code} while starting") from None

    def _collect(self, children: list[_Child], deadline: float, grace: float) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = {child.pipe: child for child in children}
        release_at = None
        while waiting and time.monotonic() < deadline:
            until = deadline if release_at is None else min(deadline, release_at)
            for pipe in wait(list(waiting), timeout=max(0.0, until - time.monotonic())):
                child = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    outcomes[child.rank] = child.receive()
                except EOFError:
                    outcomes[child.rank] = Outcome(exit_code=child.exit_code())
                if release_at is None and not outcomes[child.rank].ok:
                    release_at = time.monotonic() + grace
            if release_at is not None and waiting and time.monotonic() >= release_at:
                release_at = float("inf")  # once: who waits for a failed rank now sees a closed connection
                for child in children:
                    if child.rank in outcomes:
                        child.release()
        for child in waiting.values():
            outcomes[child.rank] = Outcome(late=True, traceback=child.stack())
        return outcomes

    def _release(self, children: list[_Child]) -> bool:
        r"""Has every rank tear its group down; whether all did so in time."""
        for child in children:
            child.release()
        for child in children:
            try:
                if not child.pipe.poll(GRACE):
                    return False
                child.receive()
            except EOFError:
                return False
        return True

    def _kill(self) -> None:
        for child in self._children:
            child.kill()
        self._children = []


def launch(
    case: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    check: bool = True,
    init: bool = True,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    r"""Runs a case on fresh processes, which end with it: for faults, environments and process set-up.

    Args:
        check: Return the values and raise :class:`GangError` unless every rank returned and ended with code 0.
            Otherwise return the :class:`Outcome` of every rank; who is left has until the deadline.
        init: Make the process group before the case.
        env: Environment variables for the processes.
    """
    gang = Gang(world_size, env=env, init=init)
    grace = GRACE if check else timeout
    outcomes = gang.outcomes(case, world_size, *args, timeout=timeout, grace=grace, **kwargs)
    if not check:
        with contextlib.suppress(GangError):
            gang.close()
        return [outcomes[rank] for rank in range(world_size)]
    try:
        return [outcome.value for outcome in _all_ok(outcomes, case)]
    finally:
        gang.close()


def _all_ok(outcomes: dict[int, Outcome], case: Callable[..., Any]) -> list[Outcome]:
    for rank, outcome in outcomes.items():  # in the order of ending: the first failure is the cause
        if outcome.ok:
            continue
        if outcome.error is not None:
            what = f"raised:\n{outcome.traceback}"
        elif outcome.exit_code is not None:
            what = f"ended with exit code {outcome.exit_code}"
        else:
            what = f"did not end before the deadline; it stands at:\n{outcome.traceback}"
        raise GangError(f"rank {rank} of {len(outcomes)} in {case.__qualname__} {what}")
    return [outcomes[rank] for rank in sorted(outcomes)]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    r"""Sets variables for the processes started inside: some are read when torch is imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
