r"""What copy and launch would run, who gets which part, and the far end's leash; real hosts are in ``test_cluster.py``."""

from __future__ import annotations

import io
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pytest

from partpar.cli import checks, copy, fleet, keep, ssh
from partpar.cli.delivery import Delivery, Item, Parcel
from partpar.cli.hosts import Host
from partpar.cli.launch import Job, check_job
from partpar.cli.main import main
from partpar.cli.ssh import RemoteCommandError, Runner, Ssh
from partpar.training import environment
from partpar.training.environment import Launch, SetupError, read_environment

A, B = Host("10.0.0.1", "ann", 2222, 29600), Host("10.0.0.2")


# --- commands


def test_the_far_end_gets_its_words_as_they_are() -> None:
    words = Ssh(Path("my config"), 7).command(A, ["echo", "a b", "$HOME", "x'y"])
    assert words[:3] == ["ssh", "-F", "my config"]
    assert words[-5:-1] == ["-p", "2222", "--", "ann@10.0.0.1"]
    assert shlex.split(words[-1]) == ["echo", "a b", "$HOME", "x'y"]
    assert "ConnectTimeout=7" in words
    assert "BatchMode=yes" in words
    assert not any("HostKeyChecking" in word for word in words), "host keys are checked as ssh is configured"


def test_each_host_gets_its_rank_and_all_the_same_meeting_place() -> None:
    job = Job(
        "/data/my run", ["train.py", "--name", "a b"], 3, {"LR": "0.1 x"}, "py", "source venv/bin/activate"
    )
    for number, host in enumerate((A, B)):
        words = job.words([A, B], number)
        assert words[:2] == ["bash", "-c"]
        assert "source venv/bin/activate\n" in words[2]
        assert words[4] == "/data/my run"
        assert "LR=0.1 x" in words
        text = " ".join(words)
        assert f"--nnodes 2 --node-rank {number} --nproc-per-node 3" in text, host
        assert "--master-addr 10.0.0.1 --master-port 29600" in text
        assert words[-3:] == ["train.py", "--name", "a b"]
    assert "--listens-at 29600" in " ".join(job.words([A, B], 0))
    assert "--listens-at" not in job.words([A, B], 1)
    assert job.words([A, B], 1)[job.words([A, B], 1).index("--towards") + 1] == "10.0.0.1"
    assert "--interface" in Job(".", ["x"], interface="eth0").words([A, B], 0)
    assert "--towards" not in Job(".", ["x"]).words([A], 0), "one host alone keeps to loopback"
    assert "PARTPAR_KEEP_THREADS=1" not in job.words([A, B], 0), "each worker takes its share of the cores"
    named = Job(".", ["x"], env={"OMP_NUM_THREADS": "1"}).words([A, B], 0)
    assert {"OMP_NUM_THREADS=1", "PARTPAR_KEEP_THREADS=1"} <= set(named)


def test_workers_talk_over_a_network_only_if_allowed() -> None:
    job = Job(".", ["train.py"])
    with pytest.raises(
        RemoteCommandError, match="10.0.0.1:2222, 10.0.0.2 would talk over the network.*--allow-remote"
    ):
        check_job([A, B], job, allow_remote=False)
    check_job([A, B], job, allow_remote=True)
    check_job([Host("127.0.0.1"), Host("127.0.0.2")], job, allow_remote=False)
    with pytest.raises(RemoteCommandError, match="expected an address that 10.0.0.2 can reach"):
        check_job([Host("127.0.0.1"), B], job, allow_remote=True)
    for wrong, message in ((Job(".", [], 0), "--nproc-per-node"), (Job(".", [], port=80), "--port")):
        with pytest.raises(RemoteCommandError, match=message):
            check_job([B], wrong, allow_remote=False)


def test_rsync_and_scp_get_bracketed_addresses() -> None:
    item = Item(Path("/here/train.py"), "train.py", 3, "0" * 64)
    parcel = Parcel(PurePosixPath("run"), (item,), is_folder=False)
    delivery = Delivery(Host("::1", "ann", 2200), Ssh(), Runner(), use_rsync=True)
    (rsync,), (scp,) = (delivery.sends(parcel, parcel.items, with_rsync) for with_rsync in (True, False))
    assert rsync[0] == "rsync"
    assert shlex.split(rsync[rsync.index("-e") + 1])[-2:] == ["-p", "2200"]
    assert scp[0] == "scp"
    assert scp[scp.index("-P") + 1] == "2200"
    for words in (rsync, scp):
        assert words[-3:-1] == ["--", "/here/train.py"]
        assert words[-1] == f"ann@[::1]:{parcel.hidden}/"
    for name in ("../x", "/x", 'a"b', "a\nb"):
        with pytest.raises(RemoteCommandError, match="expected a name"):
            Item(Path("x"), name, 0, "")


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4])
def test_hosts_get_the_parts_of_their_ranks(num_hosts: int) -> None:
    for num_parts in (1, 2, 3, 4, 6):
        for each in (n for n in range(1, 13) if num_hosts * n % num_parts == 0):
            size = num_hosts * each
            ranks = range(size)
            for host in range(num_hosts):
                wanted = {r * num_parts // size for r in ranks[host * each : (host + 1) * each]}
                assert set(copy.parts_of_host(host, num_hosts, num_parts)) == wanted


def test_extra_files_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "lib" / "__pycache__").mkdir(parents=True)
    for name in ("train.py", "lib/a.py", "lib/__pycache__/a.pyc", "lib/.secret"):
        (tmp_path / name).write_text(name)
    items = copy.extra_items([tmp_path / "train.py", tmp_path / "lib"])
    assert [item.name for item in items] == ["train.py", "lib/a.py"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.py").write_text("")
    with pytest.raises(RemoteCommandError, match="expected one file train.py"):
        copy.extra_items([tmp_path / "train.py", tmp_path / "other" / "train.py"])
    with pytest.raises(RemoteCommandError, match="expected a file or a folder, found none"):
        copy.extra_items([tmp_path / "gone"])


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("ann@10.0.0.1: Permission denied (publickey).", "ssh-copy-id ann@10.0.0.1"),
        ("Host key verification failed.", "connect once by hand"),
        ("ssh: connect to host 10.0.0.1 port 22: Connection refused", "start sshd there"),
        ("ssh: Could not resolve hostname x: Name or service not known", "no such name"),
        ("ssh: connect to host 10.0.0.1 port 22: Connection timed out", "does not answer"),
    ],
)
def test_what_ssh_says_is_explained(said: str, meant: str) -> None:
    with pytest.raises(RemoteCommandError, match=f"10.0.0.1:2222: .*{meant}"):
        ssh.checked(A, (255, "", said), "looking")
    with pytest.raises(RemoteCommandError, match="looking failed with exit code 3: it broke"):
        ssh.checked(A, (3, "", "it broke"), "looking")


def test_launch_and_copy_print_what_they_would_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("127.0.0.1\n127.0.0.2\n")
    base = ["--hosts", str(hosts), "--workspace", "run", "--dry-run"]
    assert main(["launch", *base, "--env", "A=b c", "--", "train.py", "--epochs", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[-2] for line in lines] == ["127.0.0.1", "127.0.0.2"]
    assert shlex.split(shlex.split(lines[0])[-1])[-3:] == ["train.py", "--epochs", "3"]
    assert main(["launch", *base, "--env", "nothing", "--", "train.py"]) == 1
    assert "--env: expected NAME=VALUE, found 'nothing'" in capsys.readouterr().err

    assert main(["partition", str(tmp_path / "p"), "--dataset", "karate", "--num-parts", "2"]) == 0
    capsys.readouterr()
    assert main(["copy", *base, "--part-root", str(tmp_path / "p"), "--with", __file__]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12, "look, send and publish; shares and files; two hosts"
    assert "000.safetensors" in lines[1]
    assert "001.safetensors" not in lines[1]
    (tmp_path / "p" / "metis_2" / "001.safetensors").write_bytes(b"cut off")
    assert main(["copy", *base, "--part-root", str(tmp_path / "p")]) == 1
    assert "001.safetensors: expected" in capsys.readouterr().err


# --- the far end's leash


def test_a_port_that_is_taken_is_noticed(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert keep.main(["--listens-at", str(port), "true"]) == keep.PORT_TAKEN
        assert f"port {port}: Address already in use" in capsys.readouterr().err
    assert keep.port_problem(port) is None


def test_the_interface_is_that_of_the_way() -> None:
    assert keep.interface_towards("127.0.0.2") == "lo"
    assert keep.interface_towards("no.such.name.invalid") is None


# Leaves a process in a session of its own, as torchrun does its workers, and writes all process ids.
FAMILY = """
import os, subprocess, sys, time
orphan = "import os, signal, sys, time; signal.signal(15, int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", orphan, sys.argv[1]], start_new_session=True)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def _kept(on_sigterm: int) -> tuple[subprocess.Popen[str], list[int]]:
    command = [sys.executable, "-m", "partpar.cli.keep", "--", sys.executable, "-c", FAMILY, str(on_sigterm)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in range(2)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("end", [pytest.param("hang up", marks=pytest.mark.faults), "terminate", "kill the child"])
def test_no_process_outlives_the_leash(end: str) -> None:
    process, pids = _kept(signal.SIG_IGN if end == "hang up" else signal.SIG_DFL)
    assert process.stdin is not None
    assert all(is_alive(pid) for pid in pids)
    if end == "hang up":
        process.stdin.close()
    elif end == "terminate":
        process.terminate()
    else:
        (child,) = (pid for pid in pids if _parent(pid) == process.pid)
        os.kill(child, signal.SIGKILL)
    code = process.wait(30)
    assert code == (128 + signal.SIGKILL if end == "kill the child" else 128 + signal.SIGTERM)
    assert not any(is_alive(pid) for pid in pids)


def test_the_exit_code_is_handed_on() -> None:
    command = [sys.executable, "-m", "partpar.cli.keep", "--", sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE
    ) as process:  # its end stays open: a leash that is held
        assert process.wait(60) == 7


def test_the_first_failure_ends_the_fleet() -> None:
    slow = [sys.executable, "-c", "import sys; print('on'); sys.stdin.read()"]
    fails = [
        sys.executable,
        "-c",
        "import sys, time; time.sleep(1); print('50%\\r99%', file=sys.stderr); sys.exit(4)",
    ]
    heard = io.StringIO()
    begin = time.monotonic()
    failed = fleet.run_fleet([fleet.Member("a", slow, heard), fleet.Member("b", fails, heard)])
    assert failed is not None
    assert (failed.label, failed.process.returncode, list(failed.tail)) == ("b", 4, ["99%"])
    assert heard.getvalue() == "[a] on\n"
    assert time.monotonic() - begin < 15
    well = [fleet.Member(name, [sys.executable, "-c", ""], heard) for name in "ab"]
    assert fleet.run_fleet(well) is None


# --- environments of launchers

SLURM = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04,9]-ib,login",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "job1",
}


def test_a_step_of_slurm_is_read() -> None:
    found = read_environment(SLURM)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (4, 0, 5, 1)
    assert found.master_addr == "gpu03-ib"
    assert found.master_port == read_environment({**SLURM, "SLURM_PROCID": "3"}).master_port, (
        "all ranks agree"
    )
    assert found.master_port != read_environment({**SLURM, "SLURM_STEP_ID": "1"}).master_port
    assert read_environment({**SLURM, "MASTER_ADDR": "m", "MASTER_PORT": "29500"}) == Launch(
        4, 0, 5, 1, "m", 29500
    )
    here = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu03"}
    assert read_environment(here).master_addr == "127.0.0.1", "workers of one node keep to loopback"
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    assert read_environment({**SLURM, **torchrun}) == read_environment(torchrun), "torchrun within srun"
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}
    assert not read_environment(batch).launched, "the script that sbatch runs is alone"
    assert not read_environment({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}).launched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "5"}, "SLURM_PROCID must be an integer from 0 to 4.*srun"),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, r"expected numbers such as 2\(x3\),1, found 'two'"),
        ({"SLURM_STEP_NODELIST": "[1-2]"}, "SLURM_STEP_NODELIST: expected nodes"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID must be an integer from 0 to 2"),
    ],
)
def test_a_broken_step_is_named(change: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        read_environment({**SLURM, **change})


def test_mpirun_is_read() -> None:
    found = read_environment({**OMPI, "MASTER_ADDR": "m"})
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (3, 1, 4, 2)
    assert found.master_addr == "m"
    assert found.master_port in environment._PORTS
    with pytest.raises(SetupError, match="mpirun -x MASTER_ADDR=HOST"):
        read_environment(OMPI)
    alone = {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert read_environment(alone).master_addr == "127.0.0.1"
    del alone["PMIX_NAMESPACE"]
    with pytest.raises(SetupError, match="mpirun -x MASTER_PORT=29500"):
        read_environment(alone)


@pytest.mark.parametrize(
    ("text", "first"), [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[07,9],x", "n07")]
)
def test_the_first_node_of_a_list(text: str, first: str) -> None:
    assert environment.first_node(text) == first


# --- doctor


def test_the_doctor_reports_and_fails_on_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--no-ping"]) == 0
    said = capsys.readouterr().out
    for name in ("torch_geometric", "gloo", "open files", "/dev/shm", "interfaces"):
        assert name in said
    monkeypatch.setattr(checks, "_PACKAGES", ("no-such-package",))
    assert main(["doctor", "--no-ping", "--json"]) == 1
    assert (
        '"state": "FAIL", "found": "not installed", "remedy": "pip install no-such-package"'
        in capsys.readouterr().out
    )
