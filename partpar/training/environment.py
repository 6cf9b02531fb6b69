r"""What a launcher's environment says about this worker: ``torchrun``, Open MPI's ``mpirun`` or SLURM's ``srun``."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from partpar.errors import PartparError

LOOPBACK = "127.0.0.1"
# Ports that a job's name is mapped to: below those that systems hand out by themselves.
_PORTS = range(20000, 32000)


class SetupError(PartparError, ValueError):
    r"""The environment or the arguments do not describe a worker that could be set up."""


@dataclass(frozen=True)
class Launch:
    r"""What the environment says about this worker.

    Args:
        rank: Number of this worker, from 0.
        local_rank: Number of this worker on its machine, from 0.
        world_size: Number of workers.
        local_world_size: Number of workers on this machine.
        master_addr: Host of the worker, or of the launcher, that all meet at.
        master_port: TCP port there.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int | None = None

    @property
    def launched(self) -> bool:
        r"""Whether a launcher started this process: even one worker has a process group then."""
        return self.master_port is not None

    @property
    def one_machine(self) -> bool:
        r"""Whether all workers are on this machine."""
        return self.local_world_size == self.world_size


def read_environment(env: Mapping[str, str] | None = None) -> Launch:
    r"""Reads what a launcher set. The first of these that is there counts:

    - ``torchrun``: ``RANK``, ``WORLD_SIZE``, ``MASTER_PORT`` and, if there, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and
      ``MASTER_ADDR`` (loopback if not).
    - Open MPI: ``OMPI_COMM_WORLD_RANK`` and its kin. Workers on several machines need ``MASTER_ADDR``, which
      ``mpirun -x MASTER_ADDR=…`` hands on; ``MASTER_PORT`` follows from the job's name unless it is set.
    - SLURM: ``SLURM_PROCID`` and its kin, within a step of several tasks that ``srun`` started. All meet at the first
      node of the step, at a port that follows from the job and step, unless ``MASTER_ADDR`` and ``MASTER_PORT`` say
      otherwise. The script that ``sbatch`` runs is no step, and a step of one task works alone.

    Args:
        env: The variables; :obj:`os.environ` by default.

    Returns:
        A :class:`Launch`; that of a process alone if there is no launcher.

    Raises:
        SetupError: If the environment is half set, or a number in it is none or out of range.
    """
    env = os.environ if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _open_mpi(env)
    if env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _slurm(env)
    return Launch()


def _torchrun(env: Mapping[str, str]) -> Launch:
    remedy = "start the workers with torchrun, or unset RANK and WORLD_SIZE to run one process"
    _require(env, ("RANK", "WORLD_SIZE", "MASTER_PORT"), remedy)
    world_size = _number(env, "WORLD_SIZE", 1, 1 << 20, remedy)
    rank = _number(env, "RANK", 0, world_size - 1, remedy)
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", 1, world_size, remedy, default=world_size)
    local_rank = _number(env, "LOCAL_RANK", 0, local_world_size - 1, remedy, default=rank % local_world_size)
    port = _number(env, "MASTER_PORT", 1, 65535, remedy)
    return Launch(rank, local_rank, world_size, local_world_size, env.get("MASTER_ADDR") or LOOPBACK, port)


def _open_mpi(env: Mapping[str, str]) -> Launch:
    remedy = "start the workers with Open MPI's mpirun"
    names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))
    _require(env, names, remedy)
    world_size = _number(env, names[0], 1, 1 << 20, remedy)
    rank = _number(env, names[1], 0, world_size - 1, remedy)
    local_world_size = _number(env, names[2], 1, world_size, remedy)
    local_rank = _number(env, names[3], 0, local_world_size - 1, remedy)
    address = env.get("MASTER_ADDR")
    if address is None and local_world_size < world_size:
        raise SetupError(
            f"mpirun started {world_size} workers, {local_world_size} of them on this machine, and MASTER_ADDR is not "
            "set; name the machine of rank 0: mpirun -x MASTER_ADDR=HOST …"
        )
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    if job is None and "MASTER_PORT" not in env:
        raise SetupError(
            "mpirun gave this job no name to make a port from; choose one: mpirun -x MASTER_PORT=29500 …"
        )
    port = _number(env, "MASTER_PORT", 1, 65535, remedy, default=_port_of(job or ""))
    return Launch(rank, local_rank, world_size, local_world_size, address or LOOPBACK, port)


def _slurm(env: Mapping[str, str]) -> Launch:
    remedy = "start the workers with srun"
    names = (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_TASKS_PER_NODE",
    )
    _require(env, (*names, "SLURM_STEP_NODELIST"), remedy)
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", 1, 1 << 20, remedy)
    rank = _number(env, "SLURM_PROCID", 0, world_size - 1, remedy)
    tasks = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    node = _number(env, "SLURM_NODEID", 0, len(tasks) - 1, remedy)
    local_rank = _number(env, "SLURM_LOCALID", 0, tasks[node] - 1, remedy)
    # A name can resolve to any interface; workers of one node are kept to loopback.
    first = LOOPBACK if tasks[node] == world_size else first_node(env["SLURM_STEP_NODELIST"])
    job = f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}"
    port = _number(env, "MASTER_PORT", 1, 65535, remedy, default=_port_of(job))
    return Launch(rank, local_rank, world_size, tasks[node], env.get("MASTER_ADDR") or first, port)


def tasks_per_node(text: str) -> list[int]:
    r"""Expands SLURM's numbers of tasks: ``"2(x3),1"`` is ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece.strip())
        if match is None or int(match[1]) < 1:
            raise SetupError(
                f"SLURM_STEP_TASKS_PER_NODE: expected numbers such as 2(x3),1, found {text!r}; start the workers with srun"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_node(text: str) -> str:
    r"""The first name of SLURM's list of nodes: ``"node[03-05,9],login"`` begins with ``node03``."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", text)
    if match is None:
        raise SetupError(
            f"SLURM_STEP_NODELIST: expected nodes such as node[03-05,9], found {text!r}; set MASTER_ADDR yourself"
        )
    return match[1] + (match[2] or "") + (match[3] or "")


def _port_of(job: str) -> int:
    r"""A port that all workers of a job agree on, and that two jobs on one machine seldom share."""
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]


def _require(env: Mapping[str, str], names: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        there = [f"{name}={env[name]}" for name in names if name in env]
        raise SetupError(
            f"the environment is half set: {', '.join(there)} without {', '.join(missing)}; {remedy}"
        )


def _number(
    env: Mapping[str, str], name: str, low: int, high: int, remedy: str, default: int | None = None
) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        value = int(text or "")
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise SetupError(
            f"{name} must be an integer from {low} to {high}, but the environment says {text!r}; {remedy}"
        )
    return value
