r"""Sets one worker up: its process group, its device, its threads and its memory allocator.

:func:`init` reads the environment that ``torchrun``, Open MPI or SLURM gives a worker; without any the process works
alone, with no process group at all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from partpar import lost
from partpar.training.environment import Launch, SetupError, read_environment
from partpar.training.machine import huge_pages, threads_per_worker, tune_allocator
from partpar.training.meeting import meeting_store
from partpar.training.templates import remove_templates_at_exit
from partpar.training.together import forget_groups
from partpar.variables import NETWORK_FLAG, THREADS_FLAG

_SLACK = 5.0  # seconds beyond the timeouts of meeting and connecting
_LAST_WORK = 0.1  # seconds that threads of a group get to drop what they hold


@dataclass(frozen=True)
class Context:
    r"""A worker that was set up, to be closed at its end; a context manager.

    Args:
        rank: Number of this worker, from 0.
        local_rank: Number of this worker on its machine, from 0.
        world_size: Number of workers.
        device: Where this worker keeps its tensors.
        group: The process group of all workers, or :obj:`None` for a process alone.
        backend: ``"gloo"`` or ``"nccl"``, or :obj:`None` for a process alone.
        owns_group: Whether :meth:`close` ends the process group: not if it stood before :func:`init`.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = field(repr=False)
    backend: str | None
    owns_group: bool = field(default=False, repr=False)

    @property
    def is_first(self) -> bool:
        r"""Whether this worker is rank 0, which prints and writes for all."""
        return self.rank == 0

    def close(self) -> None:
        r"""Ends the process group, if :func:`init` began it. May be called again."""
        if self.owns_group and dist.is_initialized():
            forget_groups()
            dist.destroy_process_group()
            # A DistributedDataParallel outlives this call: at exit it is freed under the interpreter's lock and waits
            # for gloo's threads, one of which may wait for that lock to drop its last finished work. Let it, now.
            time.sleep(_LAST_WORK)

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = error
        if error is not None and self.group is not None and dist.is_initialized():
            # Where torch's own collectives were torn, such as those of gradients, nobody has said yet by whom.
            found = lost.blame(error, self.group, None, "a collective of torch.distributed")
            lost.leave_word(found)
        self.close()
        if found is not None and found is not error:
            raise found from error


def choose_device(device: str | torch.device | None, launch: Launch) -> torch.device:
    r"""Returns the device of this worker: ``"cpu"`` by default, and of ``"cuda"`` the GPU ``local_rank``
    modulo their number.

    Raises:
        SetupError: If CUDA is asked for but absent, or its index is not there.
    """
    chosen = torch.device("cpu" if device is None else device)
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise SetupError(f"device must be 'cpu' or 'cuda', but found {str(chosen)!r}")
    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise SetupError(
            f"device {str(chosen)!r} was asked for, but {built}; "
            "pass device='cpu' or install a CUDA build of torch"
        )
    count = torch.cuda.device_count()
    index = launch.local_rank % count if chosen.index is None else chosen.index
    if index >= count:
        raise SetupError(f"device 'cuda:{index}' was asked for, but this machine has {count} GPU(s)")
    return torch.device("cuda", index)


def choose_backend(
    backend: str | None, device: torch.device, launch: Launch, asked: torch.device | None = None
) -> str:
    r"""Returns the backend for a device: gloo for CPUs, NCCL for GPUs, but gloo when workers share a GPU,
    which NCCL refuses.

    Args:
        backend: The user's choice, or :obj:`None`.
        device: This worker's device.
        launch: What the environment says.
        asked: The device as the user named it; with an index, all local workers share it.
    """
    if backend is not None:
        if backend not in ("gloo", "nccl"):
            raise SetupError(f"backend must be 'gloo' or 'nccl', but found {backend!r}")
        if backend == "nccl" and device.type != "cuda":
            raise SetupError(
                "backend 'nccl' needs device 'cuda', but the device is 'cpu'; "
                "pass backend='gloo' or device='cuda'"
            )
        return backend
    if device.type == "cpu":
        return "gloo"
    pinned = asked is not None and asked.index is not None
    shared = launch.local_world_size > (1 if pinned else torch.cuda.device_count())
    return "gloo" if shared or not dist.is_nccl_available() else "nccl"


def _threads_are_given(launch: Launch) -> bool:
    r"""Whether somebody set ``OMP_NUM_THREADS``, which torch heeds; a launcher's 1 is its own unless the flag says so."""
    given = os.environ.get("OMP_NUM_THREADS")
    return given is not None and (not launch.launched or given != "1" or os.environ.get(THREADS_FLAG) == "1")


def _keep_to_this_machine(launch: Launch, allow_network: bool) -> None:
    r"""Binds gloo to loopback for workers of one machine; refuses a network nobody allowed: its traffic is
    neither authenticated nor encrypted."""
    if launch.one_machine:
        if "GLOO_SOCKET_IFNAME" not in os.environ and any(name == "lo" for _, name in socket.if_nameindex()):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return
    if not (allow_network or os.environ.get(NETWORK_FLAG) == "1"):
        raise SetupError(
            f"{launch.world_size} workers, {launch.local_world_size} of them on this machine, "
            "would talk over the network, "
            "without authentication or encryption; if the network between them is trusted or tunnelled, pass "
            f"allow_network=True or set {NETWORK_FLAG}=1"
        )


def _tell_of_crashes() -> None:
    """Has Python say where it was when a library ends the process, as gloo does when more bytes come than it awaits."""
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # a standard error without a file
        if not faulthandler.is_enabled():
            faulthandler.enable()


def _set_allocator() -> str:
    r"""Makes large blocks cheap; returns how. Huge pages do so without keeping what is freed, so they come
    first."""
    if huge_pages():
        return "with huge pages"
    return "keeps freed blocks" if tune_allocator() else "as the system sets it"


def _meet(launch: Launch, backend: str, timeout: float, place: torch.device) -> None:
    r"""Makes the process group (collective)."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def give_up() -> None:
        print(
            f"partpar: rank {launch.rank} had no answer at {where} in {limit:g} s, though somebody listens there: "
            "another program? Choose another MASTER_PORT, or end what listens there",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    # torch waits without an end for the first answer of whoever listens, and hears no signal meanwhile.
    limit = 2 * timeout + _SLACK
    watch = threading.Timer(limit, give_up)
    watch.daemon = True
    watch.start()
    try:
        # Naming the device lets NCCL connect at once, so that a worker that cannot fails here and not in its first
        # exchange.
        dist.init_process_group(
            backend,
            store=meeting_store(launch, timeout),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout),
            device_id=place if backend == "nccl" else None,
        )
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise SetupError(
                f"expected a free port to meet at, but port {os.environ['MASTER_PORT']} is in use by another program or an "
                "earlier run; choose another MASTER_PORT, or end what listens there"
            ) from error
        raise SetupError(
            f"rank {launch.rank} waited up to {timeout:g} s for {launch.world_size} workers to meet at {where}, and not all "
            f"came: {said}; look at the output of the others, and whether they can reach that address"
        ) from error
    finally:
        watch.cancel()


def init(
    device: str | torch.device | None = None,
    backend: str | None = None,
    timeout: float = 120.0,
    threads: int | None = None,
    allocator: bool = True,
    quiet: bool = False,
    allow_network: bool = False,
) -> Context:
    r"""Sets this process up as a worker, from the environment of a launcher, or alone; see
    :func:`~partpar.training.environment.read_environment`.

    A process group that stands already is used, and left to its owner to end.

    Args:
        device: ``"cpu"`` (default) or ``"cuda"``, which takes the GPU of the local rank.
        backend: ``"gloo"`` or ``"nccl"``; by default NCCL for GPUs that no two workers share, else gloo.
        timeout: Seconds after which a collective that some worker does not reach raises; torch would wait half an
            hour.
        threads: Threads of this worker; by default this machine's cores divided by its workers, at least one, or for
            a process alone what ``OMP_NUM_THREADS`` says. Of a launcher's workers it counts as well, but for a 1 that
            torchrun may have set itself; with ``PARTPAR_KEEP_THREADS=1``, that too.
        allocator: Whether to make large blocks cheap. If ``THP_MEM_ALLOC_ENABLE=1`` stood in the environment
            before the first tensor was made, torch uses huge pages and nothing is left to do. Otherwise glibc
            is told to keep large blocks rather than give each back and fault its pages in again; freed memory
            then stays with the process, which may come to hold twice what it uses.
        quiet: Whether rank 0 keeps from saying on standard error what was chosen.
        allow_network: Whether workers may be on several machines. Traffic between them is neither
            authenticated nor encrypted, so the network must be trusted or tunnelled. The environment's
            ``PARTPAR_ALLOW_NETWORK=1`` says the same.

    Returns:
        The :class:`Context`, to be used with ``with`` or closed.

    Raises:
        SetupError: If the environment is half set or the arguments ask for what is not there. Raised before
            any worker is waited for.
    """
    if timeout <= 0:
        raise SetupError(f"timeout must be more than 0 seconds, but found {timeout}")
    if threads is not None and threads < 1:
        raise SetupError(f"threads must be at least 1, but found {threads}")
    launch = read_environment()
    place = choose_device(device, launch)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # partpar's own kernels ask torch for their number of threads.
    if threads is not None or not _threads_are_given(launch):
        torch.set_num_threads(threads or threads_per_worker(launch.local_world_size))
    blocks = _set_allocator() if allocator else "as the system sets it"
    _tell_of_crashes()
    remove_templates_at_exit()

    if dist.is_initialized():
        context = Context(
            dist.get_rank(),
            launch.local_rank,
            dist.get_world_size(),
            place,
            dist.group.WORLD,
            dist.get_backend(),
        )
    elif launch.launched:
        name = choose_backend(backend, place, launch, None if device is None else torch.device(device))
        _keep_to_this_machine(launch, allow_network)
        os.environ.setdefault("MASTER_ADDR", launch.master_addr)
        os.environ.setdefault("MASTER_PORT", str(launch.master_port))
        _meet(launch, name, timeout, place)
        world = dist.group.WORLD
        assert world is not None
        lost.introduce(world)
        context = Context(
            launch.rank, launch.local_rank, launch.world_size, place, dist.group.WORLD, name, owns_group=True
        )
    else:
        context = Context(0, 0, 1, place, None, None)
    if context.is_first and not quiet:
        choices = [
            f"{context.world_size} worker(s) on {place.type}",
            context.backend or "no process group",
            f"{torch.get_num_threads()} thread(s) each",
            f"allocator {blocks}",
        ]
        print("partpar:", ", ".join(choices), file=sys.stderr)
    return context
