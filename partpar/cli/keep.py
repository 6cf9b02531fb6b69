r"""Runs at the far end of ``partpar launch``: starts this host's launcher and leaves no process behind.

The connection is the leash. The command is ended when standard input closes, falls silent or says so, when this
process is told to end, and when the command itself dies; every process that descends from it, in whatever session, is
adopted by this one and ended too. Only the standard library is imported, so that it starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import ipaddress
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PORT_TAKEN = 69  # exit code: where the workers were to meet, something listens
NO_WORKSPACE = 66  # exit code of the shell around this: no such folder
BEAT = 5.0  # seconds between the launcher's signs of life
_SILENCE = 60.0  # seconds without one
_GRACE = 5.0  # seconds that processes get to end by themselves
_POLL = 0.2
_SUBREAPER, _PARENT_DEATH = 36, 1  # of prctl(2)
_INTERFACES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def main(argv: list[str] | None = None) -> int:
    r"""Runs the command that follows ``--`` and returns its exit code, or 128 and the number of its signal."""
    parser = argparse.ArgumentParser(prog="partpar.cli.keep", description="The far end of partpar launch.")
    parser.add_argument("--listens-at", type=int, metavar="PORT", help="check that this port is free")
    parser.add_argument("--towards", metavar="ADDRESS", help="use the interface that leads there")
    parser.add_argument("--interface", help="use this one")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    if args.listens_at is not None and (taken := port_problem(args.listens_at)) is not None:
        print(f"port {args.listens_at}: {taken}", file=sys.stderr)
        return PORT_TAKEN
    interface = args.interface
    if interface is None and args.towards is not None:
        interface = interface_towards(args.towards)
    if interface is not None:
        for name in _INTERFACES:
            os.environ.setdefault(name, interface)
    return keep(args.command)


def port_problem(port: int) -> str | None:
    r"""Why torch could not listen at a port of all addresses, as it does; :obj:`None` if it could."""
    try:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def interface_towards(address: str) -> str | None:
    r"""The network interface whose address this host has on the way to another; :obj:`None` if it is not found."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # of a datagram socket: sends nothing
            own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None
    for _, name in socket.if_nameindex():
        if own in addresses_of(name) or (own.is_loopback and name == "lo"):
            return name
    return None


def addresses_of(interface: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    r"""The first IPv4 address of an interface and all its IPv6 ones."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        found.append(ipaddress.IPv4Address(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            words = line.split()
            if words[-1] == interface:
                found.append(ipaddress.IPv6Address(int(words[0], 16)))
    return found


def keep(command: list[str]) -> int:
    r"""Runs a command on the leash of standard input; no descendant outlives this call."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)  # orphans come to us instead of to init
    stop: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def on_start() -> None:
        libc.prctl(_PARENT_DEATH, signal.SIGTERM, 0, 0, 0)  # should we be killed outright

    child = subprocess.Popen(  # noqa: S603  # a list of words, from our own launcher
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=on_start,  # no thread runs yet
    )
    _wait(child, stop)
    ended_by_us = child.poll() is None
    _end_all(child)
    if ended_by_us:
        return 128 + signal.SIGTERM
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _wait(child: subprocess.Popen[bytes], stop: list[int]) -> None:
    r"""Returns when the child has ended or has to."""
    heard = time.monotonic()
    while child.poll() is None and not stop and time.monotonic() - heard < _SILENCE:
        if select.select([0], [], [], _POLL)[0]:
            if not os.read(0, 4096):
                return
            heard = time.monotonic()


def _end_all(child: subprocess.Popen[bytes]) -> None:
    r"""Ends the child and all that descend from this process: politely, then not."""
    if child.poll() is None:
        child.terminate()  # torchrun ends its workers itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    begin, told = time.monotonic(), set()
    while left := descendants(os.getpid()):
        hard = time.monotonic() - begin > _GRACE
        for pid in left:
            if hard or pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if hard else signal.SIGTERM)
                told.add(pid)
        child.poll()
        _reap(child.pid)
        time.sleep(0.05)
    child.wait()


def _reap(except_for: int) -> None:
    r"""Takes the exit codes of adopted processes."""
    for pid in descendants(os.getpid()):
        if pid != except_for:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def descendants(ancestor: int) -> set[int]:
    r"""All processes below one, whatever their session."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    fresh = {ancestor}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


if __name__ == "__main__":
    sys.exit(main())
