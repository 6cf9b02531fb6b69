r"""``partpar launch`` over real ssh, to two hosts on this machine, and their doctor; see ``cluster.py``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import ADDRESSES, Cluster, free_port, missing_tools
from host_commands import (
    EXAMPLES,
    NODES,
    ROOT,
    RUN,
    cluster,
    copy_partition,
    files_in,
    launch_words,
    partitions,
    partpar_words,
    processes_below,
    run_words,
)

assert cluster and partitions  # the fixtures

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}: install openssh-server"
    ),
]


@pytest.mark.parametrize("script", ["train_full_graph.py", "train_mini_batch.py"])
def test_two_hosts_train_as_one_process_does(
    cluster: Cluster, partitions: Path, tmp_path: Path, script: str
) -> None:
    example = EXAMPLES / script
    done = copy_partition(cluster, partitions, "--with", str(example), "--json")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["parts"] for record in records] == [[0], [1]]
    for number, home in enumerate(cluster.homes.values()):
        place = f"{RUN}/partitions/planted/metis_2"
        own = {f"{place}/00{number}.safetensors", f"{place}/manifest.json", f"{RUN}/{script}"}
        assert files_in(home) == own, "a host holds its own shares and nothing else"

    options = ["--nodes", str(NODES), "--epochs", "3", "--metrics", "metrics.jsonl"]
    if script == "train_full_graph.py":
        options += ["--dtype", "float64"]
    done = run_words(launch_words(cluster, free_port(), script, *options))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[127\.0\.0\.1:\d+\] .*2 worker", done.stdout + done.stderr, re.MULTILINE)
    # A batch is so many seeds of each worker, so there the one host has as many workers.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = run_words(
        [sys.executable, *(torchrun if "batch" in script else []), str(example), *options], cwd=tmp_path
    )
    assert alone.returncode == 0, alone.stderr
    expected, found = (
        [record["loss"] for line in path.read_text().splitlines() if "loss" in (record := json.loads(line))]
        for path in (tmp_path / "metrics.jsonl", cluster.homes[ADDRESSES[0]] / RUN / "metrics.jsonl")
    )
    assert len(expected) == 3
    assert found == pytest.approx(expected, rel=1e-10 if "--dtype" in options else 1e-5)
    assert not processes_below(cluster)


def _as_users_find_it(cluster: Cluster, folder: Path) -> dict[str, str]:
    r"""Makes a clone's examples, commands and ssh as on a machine that is set up, and returns its environment."""
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    programs = {"python": [sys.executable], "partpar": [sys.executable, "-m", "partpar.cli.main"]}
    programs["torchrun"] = [sys.executable, "-m", "torch.distributed.run"]
    programs |= {name: [shutil.which(name) or "", "-F", str(cluster.ssh_config)] for name in ("ssh", "scp")}
    (folder / "bin").mkdir()
    for name, words in programs.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {" ".join(words)} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    for bins in cluster.bins.values():
        (bins / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (bins / "python3").chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "workers", "launches"),
    [(0, 4, 1), (1, 2, 2), (2, 2, 2), (3, 2, 2)],
    ids=["first", "full graph", "mini-batches", "rows and graphs"],
)
def test_the_commands_of_the_page_run_as_they_are_printed(
    cluster: Cluster, tmp_path: Path, number: int, workers: int, launches: int
) -> None:
    env = _as_users_find_it(cluster, tmp_path)
    shutil.copy(cluster.hosts_file, tmp_path / "hosts.txt")
    page = (ROOT / "docs" / "cluster.rst").read_text()
    blocks = re.findall(r"code-block:: bash\n\n((?:(?:    .*)?\n)+)", page)
    block = [block for block in blocks if "partpar copy" in block][number]
    done = subprocess.run(
        ["bash", "-euc", block],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from_hosts = [line for line in done.stderr.splitlines() if line.startswith(f"[{ADDRESSES[0]}")]
    assert sum(f"partpar: {workers} worker(s)" in line for line in from_hosts) == launches, done.stderr


def test_the_script_for_a_cluster_runs(cluster: Cluster, tmp_path: Path) -> None:
    env = _as_users_find_it(cluster, tmp_path)
    env |= {"HOSTS": str(cluster.hosts_file), "SSH_CONFIG": str(cluster.ssh_config), "PORT": str(free_port())}
    words = ["examples/cluster/run_dist.sh", "--epochs", "2"]
    done = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 worker(s)" in done.stdout


# Says that it is there, then waits for the other rank for longer than any test.
WAITS = """
import os, time
import partpar
with partpar.init(quiet=True) as worker:
    print("there", os.getpid(), flush=True)
    time.sleep(600)
"""


def _started(cluster: Cluster) -> tuple[subprocess.Popen[str], list[str]]:
    r"""A launch whose workers both wait, and what it has said."""
    for home in cluster.homes.values():
        (home / RUN).mkdir(exist_ok=True)
        (home / RUN / "waits.py").write_text(WAITS)
    words = launch_words(cluster, free_port(), "waits.py")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    while sum("there" in line for line in said) < 2:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        said.append(line)
    return process, said


@pytest.mark.parametrize("end", ["torchrun", "worker", "ssh", "SIGINT", "SIGTERM", "SIGKILL"])
def test_when_one_ends_all_end(cluster: Cluster, end: str) -> None:
    process, said = _started(cluster)
    running = processes_below(cluster)
    assert sum("torch.distributed.run" in line and "partpar.cli.keep" not in line for line in running) == 2, (
        running
    )
    begin = time.monotonic()
    if end == "torchrun":
        _kill(cluster, ADDRESSES[1], r"^\S+ -m torch\.distributed\.run ")
    elif end == "worker":
        os.kill(int(said[-1].split()[-1]), signal.SIGKILL)
    elif end == "ssh":
        _kill_child(process.pid, "ssh ")
    else:
        process.send_signal(getattr(signal, end))
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    while (left := processes_below(cluster)) and time.monotonic() - begin < 30:
        time.sleep(0.2)
    assert not left
    assert time.monotonic() - begin < 30
    if end == "torchrun":
        assert (
            f"{ADDRESSES[1]}:{cluster.port}: torchrun there was ended by signal 9; the other hosts were ended"
            in err
        )
    if end in ("SIGINT", "SIGTERM"):
        assert process.returncode == 130
        assert "partpar: stopped" in err


def _kill(cluster: Cluster, address: str, pattern: str) -> None:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(cluster.homes[address]) in str((path / "cwd").readlink()) and re.search(pattern, command):
                os.kill(int(path.name), signal.SIGKILL)
                return
        except OSError:
            continue
    raise AssertionError(f"no process like {pattern}")


def _kill_child(pid: int, begins: str) -> None:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent == pid and command.startswith(begins):
            os.kill(int(path.name), signal.SIGKILL)
            return
    raise AssertionError(f"no child {begins}")


def test_what_keeps_a_launch_from_starting_is_told(cluster: Cluster) -> None:
    done = run_words(launch_words(cluster, free_port(), "train.py"))
    assert done.returncode == 1
    assert re.search(
        r"127\.0\.0\.\d:\d+: no folder run; bring one there first: partpar copy --workspace run", done.stderr
    )
    for home in cluster.homes.values():
        (home / RUN).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run_words(launch_words(cluster, port, "train.py"))
    assert done.returncode == 1
    assert (
        f"the workers cannot meet there: port {port}: Address already in use; end what listens" in done.stderr
    )
    words = launch_words(cluster, free_port(), "train.py")
    words[words.index("--python") + 1] = "/no/such/python"
    assert "/no/such/python cannot be run there; name Python by --python" in run_words(words).stderr
    done = run_words(launch_words(cluster, free_port(), "train.py"))
    assert done.returncode == 1
    assert re.search(
        r"127\.0\.0\.\d:\d+: torchrun there failed with exit code \d+; the other hosts were ended",
        done.stderr,
    )
    assert not processes_below(cluster)


def test_the_doctor_asks_all_hosts(cluster: Cluster, partitions: Path) -> None:
    for home in cluster.homes.values():
        (home / RUN).mkdir()
    more = ["--python", sys.executable, "--port", str(free_port()), "--part-root", str(partitions), "--json"]
    done = run_words(partpar_words("doctor", cluster, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {check["host"].split(":")[0] for check in found} == {*ADDRESSES, "all"}
    states = {check["name"]: check["state"] for check in found if check["host"] == "all"}
    assert states == dict.fromkeys(
        ("same partpar", "same torch", "same torch_geometric", "ping, gloo", "ping, rpc"), "ok"
    )
    assert sum(check["name"] == "memory" for check in found) == 2
