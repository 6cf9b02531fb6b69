r"""Starting workers of one's own through torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from partpar.errors import PartparError
from partpar.variables import THREADS_FLAG


class WorkerError(PartparError, RuntimeError):
    r"""Workers failed or took too long."""


def run_workers(
    program: str, workers: int, words: Sequence[str], timeout: float, stdout: int | None = None
) -> None:
    r"""Runs a program by several workers on this machine and waits for them; their output goes where this
    process's goes.

    Args:
        program: A module's name, or the path of a file that ends in ``.py``.
        workers: Number of processes.
        words: Its arguments.
        timeout: Seconds after which all are ended.
        stdout: File descriptor for their standard output, if it is not to be this process's.

    Raises:
        WorkerError: If one fails or is not done in time; none is left behind.
    """
    if workers < 1:
        raise WorkerError(f"expected at least 1 worker, found {workers}")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(workers),
    ]
    # torchrun warns about threads unless they are named; each worker sets its own number when it starts, unless the user
    # named one.
    # torch looks for huge pages, which make large blocks cheap, only once: before the first tensor is made.
    environment = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1", **os.environ}
    if "OMP_NUM_THREADS" in os.environ:
        environment[THREADS_FLAG] = "1"
    # A session of their own, so that torchrun and its workers can be ended together.
    command = [*launcher, *([] if program.endswith(".py") else ["--module"]), program, *words]
    process = subprocess.Popen(command, start_new_session=True, env=environment, stdout=stdout)  # noqa: S603  # our own programs
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise WorkerError(
            f"{workers} worker(s) of {program} were not done in {timeout:g} s, and were ended"
        ) from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        raise WorkerError(
            f"{workers} worker(s) of {program} failed with exit code {code}; see their messages above"
        )
