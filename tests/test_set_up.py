r"""Setting workers up: what launchers tell, devices, networks, threads and memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import launch

from partpar import training
from partpar.training import machine, setup
from partpar.variables import NETWORK_FLAG

# --- the environment
# --------------------------------------------------------------------------------------------

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}



def test_without_a_launcher_a_process_is_alone() -> None:
    launch_ = setup.read_environment({"PATH": "/bin"})
    assert (launch_.rank, launch_.world_size, launch_.launched) == (0, 1, False)


def test_the_environment_of_torchrun_is_read() -> None:
    env = {**LAUNCHED, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.7"}
    found = setup.read_environment(env)
    assert found == setup.Launch(1, 0, 2, 1, "10.0.0.7", 29500)
    assert not found.one_machine
    assert setup.read_environment(LAUNCHED) == setup.Launch(1, 1, 2, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "RANK=1, MASTER_PORT=29500 without WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE=2, MASTER_PORT=29500 without RANK"),
        ({"MASTER_PORT": None}, "RANK=1, WORLD_SIZE=2 without MASTER_PORT"),
        (
            {"MASTER_PORT": "http"},
            "MASTER_PORT must be an integer from 1 to 65535, but the environment says 'http'",
        ),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be an integer from 1 to 65535"),
        ({"RANK": "2"}, "RANK must be an integer from 0 to 1, but the environment says '2'"),
        ({"RANK": "-1"}, "RANK must be an integer from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer from 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE must be an integer from 1 to 2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK must be an integer from 0 to 1"),
    ],
)
def test_a_broken_environment_is_named(change: dict[str, str | None], message: str) -> None:
    env = {name: value for name, value in {**LAUNCHED, **change}.items() if value is not None}
    with pytest.raises(setup.SetupError, match=message):
        setup.read_environment(env)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(setup.SetupError, match="'cuda' was asked for, but"):
        setup.choose_device("cuda", setup.Launch())
    with pytest.raises(setup.SetupError, match="must be 'cpu' or 'cuda', but found 'meta'"):
        setup.choose_device("meta", setup.Launch())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert setup.choose_device("cuda", setup.Launch(3, 3, 4, 4)) == torch.device("cuda", 1)
    with pytest.raises(setup.SetupError, match="'cuda:2' was asked for, but this machine has 2 GPU"):
        setup.choose_device("cuda:2", setup.Launch())


def test_workers_that_share_a_gpu_talk_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    two, four = setup.Launch(0, 0, 2, 2), setup.Launch(0, 0, 4, 4)
    assert setup.choose_backend(None, cpu, two) == "gloo"
    assert setup.choose_backend(None, gpu, two, torch.device("cuda")) == "nccl"
    assert setup.choose_backend(None, gpu, four, torch.device("cuda")) == "gloo"
    assert setup.choose_backend(None, gpu, two, torch.device("cuda:0")) == "gloo"
    assert setup.choose_backend("gloo", gpu, two) == "gloo"
    with pytest.raises(setup.SetupError, match="needs device 'cuda', but the device is 'cpu'"):
        setup.choose_backend("nccl", cpu, two)
    with pytest.raises(setup.SetupError, match="must be 'gloo' or 'nccl', but found 'mpi'"):
        setup.choose_backend("mpi", cpu, two)


def test_a_network_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = setup.Launch(0, 0, 4, 2, "10.0.0.7", 29500)
    monkeypatch.delenv(NETWORK_FLAG, raising=False)
    with pytest.raises(
        setup.SetupError, match="4 workers, 2 of them on this machine, would talk over the network"
    ):
        setup._keep_to_this_machine(spread, allow_network=False)
    setup._keep_to_this_machine(spread, allow_network=True)
    monkeypatch.setenv(NETWORK_FLAG, "1")
    setup._keep_to_this_machine(spread, allow_network=False)


def test_arguments_are_checked_first() -> None:
    with pytest.raises(setup.SetupError, match="timeout must be more than 0 seconds, but found 0"):
        training.init(timeout=0)
    with pytest.raises(setup.SetupError, match="threads must be at least 1, but found 0"):
        training.init(threads=0)


def _set_up(worker: Any) -> dict[str, Any]:
    with training.init(timeout=20, quiet=True) as context:
        facts = {
            "rank": context.rank,
            "size": context.world_size,
            "backend": context.backend,
            "threads": torch.get_num_threads(),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
            "sum": float(training.all_numbers([context.rank], context.group).sum()),
            "again": training.init(quiet=True, threads=2).owns_group,
            "chosen": torch.get_num_threads(),
        }
    context.close()
    return {**facts, "closed": not torch.distributed.is_initialized()}


def test_two_workers_are_set_up_and_torn_down() -> None:
    facts = launch(_set_up, 2, init=False)
    threads = max(1, machine.usable_cores() // 2)
    assert [fact["rank"] for fact in facts] == [0, 1]
    for fact in facts:
        assert (fact["size"], fact["backend"], fact["interface"]) == (2, "gloo", "lo")
        assert (fact["threads"], fact["chosen"]) == (threads, 2)
        assert fact["sum"] == 1.0
        assert not fact["again"], "who did not begin the process group must not end it"
        assert fact["closed"]


def test_threads_that_the_user_named_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, launched = setup.Launch(), setup.Launch(0, 0, 2, 2, master_port=29500)
    for omp, flag, of_alone, of_launched in (
        (None, None, False, False),
        ("1", None, True, False),  # torchrun's own
        ("1", "1", True, True),
        ("3", None, True, True),
    ):
        for name, value in (("OMP_NUM_THREADS", omp), ("PARTPAR_KEEP_THREADS", flag)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert setup._threads_are_given(alone) == of_alone
        assert setup._threads_are_given(launched) == of_launched


def test_alone_there_is_no_process_group(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with training.init(threads=1, allocator=False) as context:
        assert (context.rank, context.world_size, context.group, context.backend) == (0, 1, None, None)
        assert context.is_first
    said = capfd.readouterr().err
    assert "1 worker(s) on cpu, no process group, 1 thread(s) each, allocator as the system sets it" in said


LAYERS = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
import torch_geometric.nn as pyg
from partpar import nn, training
class UserConv(pyg.MessagePassing):
    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=x)
with training.init(quiet=True):
    pyg.GATConv(2, 2), nn.GCNConv(2, 2), UserConv()
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("raise", 3)])
def test_a_worker_leaves_no_source_of_pygs_layers(tmp_path: Path, end: str, code: int) -> None:
    own = tmp_path / "pyg_of_mine_1.py"  # of nobody's module
    own.touch()
    done = subprocess.run([sys.executable, "-c", LAYERS, str(tmp_path), end], capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert list(tmp_path.glob("*.py")) == [own]


def _wait_in_vain(worker: Any) -> None:
    with training.init(timeout=2, quiet=True) as context:
        if context.rank == 0:
            training.all_numbers([1.0], context.group)


@pytest.mark.faults
def test_a_worker_that_does_not_come_is_not_waited_for_forever() -> None:
    outcomes = launch(_wait_in_vain, 2, init=False, check=False, timeout=60)
    assert outcomes[0].error is not None or outcomes[0].exit_code, "rank 0 must fail, not hang"
    assert not outcomes[0].late


# --- the machine
# --------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_was_freed_until_it_is_forgotten() -> None:
    before = training.peak_memory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    held = training.peak_memory()
    assert held >= before
    assert held > 64 << 20
    if training.forget_peak_memory():
        assert training.peak_memory() <= held


def _how_blocks_are_made(worker: Any) -> tuple[bool, str]:
    return machine.huge_pages(), setup._set_allocator()


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_huge_pages_spare_the_allocator_its_hoarding() -> None:
    assert launch(_how_blocks_are_made, 1, env={"THP_MEM_ALLOC_ENABLE": "1"}) == [(True, "with huge pages")]
    [(huge, how)] = launch(_how_blocks_are_made, 1, env={"THP_MEM_ALLOC_ENABLE": "0"})
    assert not huge
    assert how in ("keeps freed blocks", "as the system sets it")


def test_the_allocator_is_left_alone_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not training.tune_allocator()
