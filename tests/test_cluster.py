r"""``partpar copy`` and ``partpar launch`` over real ssh, to two hosts on this machine; see ``cluster.py``."""

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
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import ADDRESSES, Cluster, free_port, missing_tools

from partpar import GraphData, datasets

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}: install openssh-server"
    ),
]
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NODES = 400
RUN = "run"  # the workspace, in each host's home
HOME_TOOLS = ["sh", "dirname", "mkdir", "df", "tail", "sed", "sha256sum", "ls", "mv", "rm", "sync", "true"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def partitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""The graph of the examples in two parts."""
    root = tmp_path_factory.mktemp("parts")
    GraphData.from_pyg_data(datasets.planted(NODES)).partition_graph(root, 2, partition_kwargs={"seed": 0})
    return root


def _partpar(command: str, cluster: Cluster, *more: str, config: Path | None = None) -> list[str]:
    words = [sys.executable, "-m", "partpar.cli.main", command, "--hosts", str(cluster.hosts_file)]
    return [*words, "--ssh-config", str(config or cluster.ssh_config), "--workspace", RUN, *more]


def _run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=env, **options)  # type: ignore[call-overload]


def _copy(
    cluster: Cluster, partitions: Path, *more: str, config: Path | None = None
) -> subprocess.CompletedProcess[str]:
    where = ["--part-root", str(partitions), "--rel-data-path", "partitions/planted"]
    return _run(_partpar("copy", cluster, *where, *more, config=config))


def _launch_words(cluster: Cluster, port: int, *program: str) -> list[str]:
    return _partpar("launch", cluster, "--python", sys.executable, "--port", str(port), "--", *program)


def _files(home: Path) -> set[str]:
    return {
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def _whole(cluster: Cluster) -> list[Path]:
    r"""Partitions that look whole at any host."""
    return [path for home in cluster.homes.values() for path in home.glob(f"{RUN}/partitions/planted/[!.]*")]


def _processes_below(cluster: Cluster) -> list[str]:
    r"""Processes that work in a host's home."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(cluster.folder / "homes") in str((path / "cwd").readlink()):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("script", ["train_full_graph.py", "train_mini_batch.py"])
def test_two_hosts_train_as_one_process_does(
    cluster: Cluster, partitions: Path, tmp_path: Path, script: str
) -> None:
    example = EXAMPLES / script
    done = _copy(cluster, partitions, "--with", str(example), "--json")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["parts"] for record in records] == [[0], [1]]
    for number, home in enumerate(cluster.homes.values()):
        place = f"{RUN}/partitions/planted/metis_2"
        own = {f"{place}/00{number}.safetensors", f"{place}/manifest.json", f"{RUN}/{script}"}
        assert _files(home) == own, "a host holds its own shares and nothing else"

    options = ["--nodes", str(NODES), "--epochs", "3", "--metrics", "metrics.jsonl"]
    if script == "train_full_graph.py":
        options += ["--dtype", "float64"]
    done = _run(_launch_words(cluster, free_port(), script, *options))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[127\.0\.0\.1:\d+\] .*2 worker", done.stdout + done.stderr, re.MULTILINE)
    # A batch is so many seeds of each worker, so there the one host has as many workers.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = _run(
        [sys.executable, *(torchrun if "batch" in script else []), str(example), *options], cwd=tmp_path
    )
    assert alone.returncode == 0, alone.stderr
    expected, found = (
        [record["loss"] for line in path.read_text().splitlines() if "loss" in (record := json.loads(line))]
        for path in (tmp_path / "metrics.jsonl", cluster.homes[ADDRESSES[0]] / RUN / "metrics.jsonl")
    )
    assert len(expected) == 3
    assert found == pytest.approx(expected, rel=1e-10 if "--dtype" in options else 1e-5)
    assert not _processes_below(cluster)


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
    words = _launch_words(cluster, free_port(), "waits.py")
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
    running = _processes_below(cluster)
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
    while (left := _processes_below(cluster)) and time.monotonic() - begin < 30:
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


def test_without_rsync_at_the_far_end_scp_copies(cluster: Cluster, partitions: Path) -> None:
    cluster.only(ADDRESSES[0], *HOME_TOOLS)
    done = _copy(cluster, partitions, "--json")
    assert done.returncode == 0, done.stderr
    by = [json.loads(line)["parcels"][0]["by"] for line in done.stdout.splitlines()]
    assert by == ["scp", "rsync"]
    for number, home in enumerate(cluster.homes.values()):
        name = f"00{number}.safetensors"
        copied = (home / RUN / "partitions/planted/metis_2" / name).read_bytes()
        assert copied == (partitions / "metis_2" / name).read_bytes()


def test_an_interrupted_copy_is_resumed_and_looks_like_nothing_until_then(
    cluster: Cluster, partitions: Path
) -> None:
    # A sender that is cut off after the first bytes of the share.
    program = cluster.bins[ADDRESSES[1]] / "rsync"
    program.write_text("#!/bin/sh\nexit 12\n")
    program.chmod(0o755)
    done = _copy(cluster, partitions)
    assert done.returncode == 1
    assert f"{ADDRESSES[1]}:{cluster.port}: sending failed with exit code" in done.stderr
    assert [path.parents[3] for path in _whole(cluster)] == [cluster.homes[ADDRESSES[0]]]
    (hidden,) = (cluster.homes[ADDRESSES[1]] / RUN / "partitions/planted").glob(".metis_2-arriving-*")
    share = (partitions / "metis_2" / "001.safetensors").read_bytes()
    (hidden / "001.safetensors").write_bytes(b"?" + share[1 : len(share) // 2])
    shutil.copy(partitions / "metis_2" / "manifest.json", hidden)
    program.unlink()

    done = _copy(cluster, partitions, "--json")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line)["parcels"][0] for line in done.stdout.splitlines())
    assert first["by"] == "there already"
    assert second["sent_bytes"] == len(share), "the manifest had arrived"
    place = cluster.homes[ADDRESSES[1]] / RUN / "partitions/planted"
    assert (place / "metis_2" / "001.safetensors").read_bytes() == share
    assert [path.name for path in place.iterdir()] == ["metis_2"]


def test_damage_on_the_way_is_noticed(cluster: Cluster, partitions: Path) -> None:
    damaging = cluster.bins[ADDRESSES[0]] / "rsync"
    damaging.write_text(
        f'#!/bin/sh\n{shutil.which("rsync")} "$@"; code=$?\n'
        f"for f in {RUN}/partitions/planted/.*/000.safetensors; do printf x | dd of=$f bs=1 seek=200 conv=notrunc 2>/dev/null; done\n"
        "exit $code\n"
    )
    damaging.chmod(0o755)
    done = _copy(cluster, partitions)
    assert done.returncode == 1
    assert (
        f"{ADDRESSES[0]}:{cluster.port}: {RUN}/partitions/planted/metis_2: what arrived is not" in done.stderr
    )
    assert [path.parents[3] for path in _whole(cluster)] == [cluster.homes[ADDRESSES[1]]]
    damaging.unlink()
    assert _copy(cluster, partitions).returncode == 0


def test_another_partition_is_replaced_only_if_told(
    cluster: Cluster, partitions: Path, tmp_path: Path
) -> None:
    assert _copy(cluster, partitions).returncode == 0
    GraphData.from_pyg_data(datasets.planted(NODES + 1)).partition_graph(tmp_path / "other", 2)
    done = _copy(cluster, tmp_path / "other")
    assert done.returncode == 1
    assert "expected no partition or this very one, found another; pass --overwrite" in done.stderr
    manifest = (partitions / "metis_2" / "manifest.json").read_bytes()
    assert [(path / "manifest.json").read_bytes() for path in _whole(cluster)] == [manifest] * 2
    assert _copy(cluster, tmp_path / "other", "--overwrite").returncode == 0
    assert [(path / "manifest.json").read_bytes() == manifest for path in _whole(cluster)] == [False] * 2


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "wrong key",
            r"127\.0\.0\.1:\d+: it let nobody in with the keys that ssh offered; add yours with: ssh-copy-id",
        ),
        ("unknown host", r"127\.0\.0\.1:\d+: ssh does not know its key; connect once by hand"),
        ("nobody there", r"127\.0\.0\.2:\d+: nothing listens at its ssh port; start sshd there"),
        ("bad file", r"hosts\.txt:2: expected an address, found '127\.0\.0\.300'"),
        (
            "rights",
            r"127\.0\.0\.1:\d+: run/partitions/planted/metis_2: could not make the folder: .*another --workspace",
        ),
    ],
)
def test_what_keeps_a_copy_from_its_host_is_told(
    cluster: Cluster, partitions: Path, trouble: str, message: str
) -> None:
    config = cluster.folder / "other_config"
    cluster.write_ssh_config(config, key="wrong_key" if trouble == "wrong key" else "key")
    if trouble == "unknown host":
        (cluster.folder / "empty").touch()
        cluster.write_ssh_config(config, known_hosts="empty")
    elif trouble == "nobody there":
        cluster.hosts_file.write_text(f"127.0.0.1:{cluster.port}\n127.0.0.2:{free_port()}\n")
    elif trouble == "bad file":
        cluster.hosts_file.write_text(f"127.0.0.1:{cluster.port}\n127.0.0.300\n")
    elif trouble == "rights":
        (cluster.homes[ADDRESSES[0]] / RUN).write_text("a file, where a folder is to be")
    done = _copy(cluster, partitions, config=config)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert (
        not any(path.is_relative_to(cluster.homes[ADDRESSES[0]]) for path in _whole(cluster))
        or trouble == "nobody there"
    )


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root"
)
@pytest.mark.parametrize("seen", ["before", "while sending", "while sending by scp"])
def test_a_full_disk_is_told(cluster: Cluster, partitions: Path, seen: str) -> None:
    disk = cluster.homes[ADDRESSES[1]] / RUN
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine mounts nothing")
    if seen != "before":  # a disk that fills up meanwhile: what it says at first is wrong
        bins = cluster.bins[ADDRESSES[1]]
        if "scp" in seen:
            cluster.only(ADDRESSES[1], *(tool for tool in HOME_TOOLS if tool != "df"))
        real = shutil.which("df")
        lies = f'[ -e {bins}/asked ] && exec {real} "$@"; : > {bins}/asked; echo "tmpfs 999999999 1 99999999 1% /"'
        (bins / "df").write_text(f"#!/bin/sh\n{lies}\n")
        (bins / "df").chmod(0o755)
    try:
        done = _copy(cluster, partitions)
        assert done.returncode == 1
        message = (
            r"127\.0\.0\.2:\d+: run/partitions/planted/metis_2: the disk is full: [\d,]+ bytes were to come"
        )
        assert re.search(message, done.stderr), done.stderr
        assert [path.parents[3] for path in _whole(cluster)] == [cluster.homes[ADDRESSES[0]]]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_keeps_a_launch_from_starting_is_told(cluster: Cluster) -> None:
    done = _run(_launch_words(cluster, free_port(), "train.py"))
    assert done.returncode == 1
    assert re.search(
        r"127\.0\.0\.\d:\d+: no folder run; bring one there first: partpar copy --workspace run", done.stderr
    )
    for home in cluster.homes.values():
        (home / RUN).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = _run(_launch_words(cluster, port, "train.py"))
    assert done.returncode == 1
    assert (
        f"the workers cannot meet there: port {port}: Address already in use; end what listens" in done.stderr
    )
    words = _launch_words(cluster, free_port(), "train.py")
    words[words.index("--python") + 1] = "/no/such/python"
    assert "/no/such/python cannot be run there; name Python by --python" in _run(words).stderr
    done = _run(_launch_words(cluster, free_port(), "train.py"))
    assert done.returncode == 1
    assert re.search(
        r"127\.0\.0\.\d:\d+: torchrun there failed with exit code \d+; the other hosts were ended",
        done.stderr,
    )
    assert not _processes_below(cluster)


def test_the_doctor_asks_all_hosts(cluster: Cluster, partitions: Path) -> None:
    for home in cluster.homes.values():
        (home / RUN).mkdir()
    more = ["--python", sys.executable, "--port", str(free_port()), "--part-root", str(partitions), "--json"]
    done = _run(_partpar("doctor", cluster, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {check["host"].split(":")[0] for check in found} == {*ADDRESSES, "all"}
    states = {check["name"]: check["state"] for check in found if check["host"] == "all"}
    assert states == dict.fromkeys(
        ("same partpar", "same torch", "same torch_geometric", "ping, gloo", "ping, rpc"), "ok"
    )
    assert sum(check["name"] == "memory" for check in found) == 2
