r"""What ``partpar doctor`` looks at on one machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from partpar.cli.keep import addresses_of
from partpar.cli.ping import RPC
from partpar.cli.workers import WorkerError, run_workers
from partpar.partition import Manifest

OK, WARN, FAIL = "ok", "warn", "FAIL"
_PACKAGES = ("partpar", "torch", "torch_geometric", "numpy", "numba", "safetensors", "pymetis")
_FILES = 4096  # a worker holds a few for each peer, its shares and its data loaders
_SHM = "/dev/shm"  # noqa: S108  # looked at, not written
_SHARED_MEMORY = 256 << 20  # what containers give by default, 64 MiB, is too little for loaders' processes


@dataclass(frozen=True)
class Check:
    r"""One line of the doctor's table.

    Args:
        name: What was looked at.
        state: ``"ok"``, ``"warn"`` or ``"FAIL"``.
        found: What was found.
        remedy: What to do, unless all is well.
        host: On which host.
    """

    name: str
    state: str
    found: str
    remedy: str = ""
    host: str = ""


def versions() -> list[Check]:
    r"""Of Python and what partpar stands on."""
    checks = [Check("python", OK, platform.python_version())]
    for name in _PACKAGES:
        try:
            checks.append(Check(name, OK, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, FAIL, "not installed", f"pip install {name}"))
    return checks


def backends() -> list[Check]:
    r"""Of torch.distributed, and the GPUs."""
    gloo, nccl = (
        dist.is_available() and dist.is_gloo_available(),
        dist.is_available() and dist.is_nccl_available(),
    )
    gpus = torch.cuda.device_count()
    return [
        Check("gloo", OK, "there")
        if gloo
        else Check("gloo", FAIL, "not built into this torch", "install a torch that has torch.distributed"),
        Check("GPUs", OK, f"{gpus}, NCCL {'there' if nccl else 'not there'}")
        if nccl or not gpus
        else Check(
            "GPUs", WARN, f"{gpus}, no NCCL", "install a CUDA build of torch; gloo copies over the CPU"
        ),
    ]


def interfaces() -> list[Check]:
    r"""Of the network, and whether this machine knows its own name, which gloo looks up where no interface is named."""
    found = {name: [str(address) for address in addresses_of(name)] for _, name in socket.if_nameindex()}
    text = "; ".join(f"{name} {' '.join(addresses)}" for name, addresses in found.items() if addresses)
    checks = [
        Check("interfaces", OK if text else WARN, text or "none", "" if text else "bring the network up")
    ]
    name = socket.gethostname()
    try:
        place = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        remedy = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME (partpar launch does)"
        return [*checks, Check("own name", WARN, f"{name}: {error}", remedy)]
    return [*checks, Check("own name", OK, f"{name} is {place}")]


def limits() -> list[Check]:
    r"""Open files and shared memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= _FILES
    checks = [
        Check(
            "open files",
            OK if enough else WARN,
            f"{files}",
            "" if enough else f"ulimit -n {_FILES} before starting",
        )
    ]
    try:
        shared = shutil.disk_usage(_SHM)
    except OSError as error:
        return [
            *checks,
            Check(_SHM, WARN, str(error), "mount a tmpfs there; loaders' processes hand batches over it"),
        ]
    roomy = shared.free >= _SHARED_MEMORY
    remedy = "" if roomy else "make it larger: docker run --shm-size 1g, or mount -o remount,size=1g /dev/shm"
    return [*checks, Check(_SHM, OK if roomy else WARN, f"{shared.free >> 20} MiB free", remedy)]


def tools() -> list[Check]:
    r"""Programs that copy and launch need here."""
    ssh, rsync = shutil.which("ssh"), shutil.which("rsync")
    return [
        Check("ssh", OK, ssh)
        if ssh
        else Check("ssh", WARN, "not there", "install openssh-client for copy and launch"),
        Check("rsync", OK, rsync)
        if rsync
        else Check("rsync", WARN, "not there: copies go by scp", "install rsync to resume large files"),
    ]


def free_memory() -> int:
    r"""Bytes that programs can still have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def memory(manifest: Manifest, parts: Sequence[int], free: int) -> Check:
    r"""Whether shares fit into a machine's free memory.

    Args:
        manifest: Of the partition.
        parts: Those that the machine is to hold.
        free: Bytes that it has.
    """
    needed = sum(manifest.shares[part].num_bytes for part in parts)
    found = f"{len(parts)} share(s) of {needed >> 20} MiB, {free >> 20} MiB free"
    if needed > free:
        return Check("memory", FAIL, found, "cut into more parts and use more machines")
    if needed * 2 > free:
        return Check("memory", WARN, found, "layers need room too; see partpar inspect --predict")
    return Check("memory", OK, found)


def pings(timeout: float) -> list[Check]:
    r"""Whether two ranks on this machine reach each other, over each backend."""
    names = ["gloo", RPC]
    if torch.cuda.device_count() > 1 and dist.is_nccl_available():
        names.append("nccl")
    checks = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="partpar-ping-") as folder:
            result = Path(folder, "result.json")
            try:
                run_workers("partpar.cli.ping", 2, [name, str(timeout / 2), str(result)], timeout)
            except WorkerError as error:
                remedy = (
                    "see its messages above; free ports, loopback and GLOO_SOCKET_IFNAME are the usual causes"
                )
                checks.append(Check(f"ping, {name}", FAIL, str(error), remedy))
                continue
            checks.append(Check(f"ping, {name}", OK, told(result.read_text())))
    return checks


def told(line: str) -> str:
    r"""What a ping found, for people."""
    found = json.loads(line)
    speed = f", {found['GB/s']:.2f} GB/s" if "GB/s" in found else ""
    return f"{found['ranks']} ranks, {found['ms']:.2f} ms{speed}"


def machine() -> list[Check]:
    r"""Cores and memory."""
    return [
        Check("cores", OK, f"{len(os.sched_getaffinity(0))}"),
        Check("free memory", OK, f"{free_memory() >> 20} MiB"),
    ]


def all_checks(manifest: Manifest | None, timeout: float | None) -> list[Check]:
    r"""All of them; no ping without a timeout, no fit into memory without a manifest."""
    found = [*versions(), *backends(), *machine(), *interfaces(), *limits(), *tools()]
    if manifest is not None:
        found.append(memory(manifest, range(manifest.num_parts), free_memory()))
    return found if timeout is None else found + pings(timeout)
