r"""Faults put into real workers from outside of the code under test.

:func:`run` starts a script as so many worker processes, each a group leader of its own, and watches them until all have
ended or a deadline passes; nothing outlives it. What a worker does to itself, and where, stands in a :class:`Fault`:
``python faults.py`` reads it from the environment, wraps the function at that point and then runs the script, so that
no code of the library knows of it.

    done = run("train", 3, Fault("kill", rank=1, point="route.apply", call=5))
    assert all(worker.code != 0 for worker in done.workers)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VARIABLE = "PARTPAR_TEST_FAULT"
BOOM = "this was done on purpose"
STRUCK = "the fault struck at"
_LAST_WORDS = 3.0  # seconds that a worker gets at the deadline to write its stacks

# Where a fault can be put: a name for each, and the function that stands there.
POINTS = {
    "forward": "torch.nn.functional:relu",
    "backward": "partpar.transfer:ReduceSum.forward",
    "route.apply": "partpar.route:Route.apply",
    "exchange": "partpar.exchange:send_rows",
    "loss": "partpar.nn.loss:global_mean",
    "step": "torch.optim.sgd:SGD.step",
    "start": "partpar.serving.agent:start",
    "sampling": "partpar.serving.service:Service.hop_begin",
    "answer": "partpar.serving.transport:Verbs.answer",
    "fetch": "partpar.serving.service:Service.fetch_all_begin",
    "write": "partpar.sharded.tensor:DistTensor.__setitem__",
    "lookup": "partpar.sharded.tensor:DistTensor.__getitem__",
    "rename": "os:rename",
    "checkpoint": "partpar.training.checkpoint_storage:_Writer.write_data",
}


@dataclass(frozen=True)
class Fault:
    r"""What happens to one rank.

    Args:
        what: ``"kill"``, ``"stop"``, ``"segv"``, ``"raise"``, ``"exit"`` or ``"delay"``.
        rank: To whom.
        point: A key of :data:`POINTS`, or ``"module:function"``.
        call: At which call of that function, from 1.
        seconds: Of a delay.
        after: Whether the function does its work first.
    """

    what: str
    rank: int
    point: str
    call: int = 3
    seconds: float = 1.0
    after: bool = False

    def strike(self) -> None:
        r"""Does it, to this process."""
        print(f"{STRUCK} {time.time()}", flush=True)
        numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}
        if self.what in numbers:
            os.kill(os.getpid(), numbers[self.what])
            time.sleep(0.1)  # until it has arrived
        elif self.what == "raise":
            raise ZeroDivisionError(BOOM)
        elif self.what == "exit":
            os._exit(7)
        elif self.what == "delay":
            time.sleep(self.seconds)
        else:
            raise ValueError(f"expected kill, stop, segv, raise, exit or delay, found {self.what!r}")

    def arm(self) -> None:
        r"""Wraps the function at the point."""
        module, _, path = POINTS.get(self.point, self.point).partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        kept = vars(owner)[name]
        function: Callable[..., Any] = kept.__func__ if isinstance(kept, staticmethod) else kept
        count = 0

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == self.call
            if mine and not self.after:
                self.strike()
            result = function(*args, **kwargs)
            if mine and self.after:
                self.strike()
            return result

        setattr(owner, name, staticmethod(wrapped) if isinstance(kept, staticmethod) else wrapped)


@dataclass
class Ended:
    r"""How a worker ended: its exit code (negative: the signal; None: it was still there at the deadline), what it
    wrote, and after how many seconds."""

    code: int | None
    text: str
    seconds: float

    @property
    def last_line(self) -> str:
        r"""The last line that it wrote: of a traceback, the error."""
        lines = [line for line in self.text.strip().splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class Run:
    r"""All workers; they were started at :obj:`began`."""

    workers: list[Ended] = field(default_factory=list)
    began: float = 0.0

    @property
    def seconds(self) -> float:
        r"""From the start until the last worker had ended by itself."""
        return max(worker.seconds for worker in self.workers if worker.code is not None)

    @property
    def seconds_after(self) -> float:
        r"""From the fault until then."""
        struck = re.search(rf"{STRUCK} ([\d.]+)", "".join(worker.text for worker in self.workers))
        assert struck is not None, f"the fault did not come to pass:\n{self}"
        return self.began + self.seconds - float(struck[1])

    def __str__(self) -> str:
        return "\n".join(
            f"--- rank {rank}: code {w.code} after {w.seconds:.1f} s\n{w.text}" for rank, w in enumerate(self.workers)
        )


def free_port() -> int:
    r"""A port that nobody listens on, below those that systems hand out by themselves: another run may take many of these
    before this one is used."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port
    raise OSError("expected a free port, found none in a hundred")


def run(
    script: str | Path,
    world_size: int,
    fault: Fault | None = None,
    *words: str,
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
    meanwhile: Callable[[list[subprocess.Popen]], None] | None = None,
) -> Run:
    r"""Runs a script as workers of one machine, with the environment that ``torchrun`` would give them.

    Args:
        script: A path, or the name of one beside this file.
        world_size: Number of workers.
        fault: What befalls one of them.
        words: Arguments of the script.
        timeout: Seconds until who is left is killed, and counts as hanging. A worker that the fault stopped is not
            waited for: it is ended once all others have.
        env: Further variables.
        meanwhile: Called with the processes once all are started.
    """
    path = HERE / f"{script}.py" if isinstance(script, str) and not script.endswith(".py") else Path(script)
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "PYTHONFAULTHANDLER": "1"}
    base |= {VARIABLE: json.dumps(None if fault is None else asdict(fault)), **(env or {})}
    stopped = fault.rank if fault is not None and fault.what == "stop" else None
    processes: list[subprocess.Popen] = []
    files = []
    try:
        for rank in range(world_size):
            files.append(os.fdopen(os.memfd_create(f"rank {rank}"), "w+b"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "faults.py"), str(path), *words],
                    env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=files[rank],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        start, began = time.monotonic(), time.time()
        if meanwhile is not None:
            meanwhile(processes)
        ended: dict[int, tuple[int | None, float]] = {}
        while time.monotonic() - start < timeout and len(ended) < world_size - (stopped is not None):
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = (process.returncode, time.monotonic() - start)
            time.sleep(0.02)
        for rank, process in enumerate(processes):
            if rank not in ended and rank != stopped:
                process.send_signal(signal.SIGABRT)  # so that it says where it stands
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LAST_WORDS)
    finally:
        for process in processes:
            end(process)
    done = Run(began=began)
    for rank, file in enumerate(files):
        file.seek(0)
        code, seconds = ended.get(rank, (None, time.monotonic() - start))
        done.workers.append(Ended(code, file.read().decode(errors="replace"), seconds))
        file.close()
    return done


def end(process: subprocess.Popen) -> None:
    r"""Ends a worker and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    process.wait()


def main() -> None:
    r"""A worker: puts the fault in, then runs the script."""
    fault = json.loads(os.environ[VARIABLE])
    if fault is not None and fault["rank"] == int(os.environ["RANK"]):
        Fault(**fault).arm()
    sys.argv = sys.argv[1:]
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
