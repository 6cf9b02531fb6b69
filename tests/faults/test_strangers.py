r"""Strangers at the ports of a training: they connect, say nothing, half of something, or garbage. Training goes on."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from faults import Run, run

pytestmark = pytest.mark.faults


def listening(pids: set[int]) -> set[tuple[str, int]]:
    r"""Where some processes listen."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            for connection in psutil.Process(pid).net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
    return found


class Strangers:
    r"""Who calls at all ports of some processes, again and again, until told to stop.

    Args:
        garbage: Whether random bytes and great lengths are sent; else a header or a message that ends half-way.
    """

    def __init__(self, garbage: bool) -> None:
        self._garbage = garbage
        self._draw, self._stop, self._held = random.Random(0), threading.Event(), []
        self.calls: dict[tuple[str, int], int] = {}
        self._thread = threading.Thread(target=lambda: None)

    def begin(self, processes: list[subprocess.Popen]) -> None:
        self._thread = threading.Thread(target=self._call, args=({process.pid for process in processes},), daemon=True)
        self._thread.start()

    def _call(self, pids: set[int]) -> None:
        while not self._stop.is_set():
            for where in sorted(listening(pids)):
                great = (self._draw.randbytes(200), struct.pack("<q", 1 << 40), struct.pack("<i", -1) * 2)
                half = (b"", b"\x03", b"half", struct.pack("<q", 1 << 20) + b"half")
                for greeting in (*half, *(great if self._garbage else ())):
                    self._greet(where, greeting)
            time.sleep(0.3)

    def _greet(self, where: tuple[str, int], greeting: bytes) -> None:
        r"""Half of the callers hang up; the others stall with the line open."""
        host = "::1" if ":" in where[0] else "127.0.0.1"
        with contextlib.suppress(OSError):
            line = socket.create_connection((host, where[1]), timeout=2)
            line.sendall(greeting)
            self.calls[where] = self.calls.get(where, 0) + 1
            if self._draw.random() < 0.5 or len(self._held) > 60:
                line.close()
            else:
                self._held.append(line)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(20)
        for line in self._held:
            line.close()


def train_among(strangers: Strangers, how: str, folder: Path, kinds_of_ports: int) -> Run:
    try:
        done = run("train", 2, None, how, str(folder), "1000", timeout=150.0, meanwhile=strangers.begin)
    finally:
        strangers.end()
    assert len(strangers.calls) >= kinds_of_ports and sum(strangers.calls.values()) >= 50, strangers.calls
    return done


@pytest.mark.timed("1,000 steps among strangers")
@pytest.mark.parametrize(
    ("how", "garbage"), [("full", True), ("batches", False)], ids=["garbage at the store and gloo", "half messages, everywhere"]
)
def test_training_goes_on(how: str, garbage: bool, tmp_path: Path) -> None:
    strangers = Strangers(garbage)
    done = train_among(strangers, how, tmp_path, 5 if how == "batches" else 3)  # two workers' gloo and RPC, and the store
    assert [worker.code for worker in done.workers] == [0, 0], f"strangers called at {strangers.calls}\n{done}"
    assert all(worker.last_line == "ended well" for worker in done.workers), str(done)


@pytest.mark.timed("garbage at the port of RPC, until all have ended")
def test_garbage_at_the_port_of_rpc_ends_the_run_at_worst(tmp_path: Path) -> None:
    r"""torch reads a length there and makes room for it. The worker may be ended by that, but nobody hangs."""
    done = train_among(Strangers(garbage=True), "batches", tmp_path, 5)
    assert None not in [worker.code for worker in done.workers], str(done)


def test_nothing_listens_beyond_this_machine(tmp_path: Path) -> None:
    r"""What workers of one machine open is on loopback, the place where they meet too."""
    seen: set[tuple[str, int]] = set()

    def watch(processes: list[subprocess.Popen]) -> None:
        def look() -> None:
            while any(process.poll() is None for process in processes):
                seen.update(listening({process.pid for process in processes}))
                time.sleep(0.1)

        threading.Thread(target=look, daemon=True).start()

    done = run("train", 2, None, "batches", str(tmp_path), "300", timeout=120.0, meanwhile=watch)
    assert [worker.code for worker in done.workers] == [0, 0], str(done)
    assert len(seen) >= 5
    assert {ip for ip, _ in seen} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_no_secret_of_the_relay_is_guessed(tmp_path: Path) -> None:
    r"""The socket through which processes that make batches ask is guarded by a folder and a key."""
    from graphs import directed_graph

    from partpar import GraphData
    from partpar.sampling.relay import Relay, RelayedService
    from partpar.serving import start_service

    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 1, algorithm="random")
    relay = Relay(start_service(GraphData.load_partition(tmp_path, 0, 1, algorithm="random")))
    try:
        assert Path(relay.address.path).parent.stat().st_mode & 0o077 == 0
        for words in (b"", b"\0\0\0\5hello", struct.pack("!i", -1), struct.pack("!i", 1 << 30) + b"half"):
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(relay.address.path)
                line.sendall(words)
                line.settimeout(0.2)
        assert RelayedService(relay.address).num_parts == 1, "it still answers those with the key"
    finally:
        relay.close()
