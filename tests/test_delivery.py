r"""Deliveries and jobs with a shell of this machine in the place of ssh, so that they need no server."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from partpar.cli import checks, copy, doctor
from partpar.cli.delivery import Delivery, Item, Parcel
from partpar.cli.hosts import Host
from partpar.cli.launch import Job, run_job
from partpar.cli.main import main
from partpar.cli.ssh import RemoteCommandError, Runner, Ssh

HOST = Host("10.0.0.1")


class Shell(Runner):
    r"""Runs what ssh would run in a folder that stands for the home there; copies what rsync or scp would send.

    Args:
        home: The folder.
        after_send: Is called once the files have arrived; what it raises breaks the connection.
    """

    def __init__(self, home: Path, after_send: Callable[[list[Path]], None] = lambda paths: None) -> None:
        super().__init__()
        self.home, self.after_send = home, after_send
        self.sent: list[str] = []

    def run(
        self, words: Sequence[str], stdin: str = "", on_output: Callable[[bytes], None] | None = None
    ) -> tuple[int, str, str]:
        if words[0] == "ssh":
            done = subprocess.run(
                ["sh", "-c", words[-1]],
                input=stdin,
                cwd=self.home,
                capture_output=True,
                text=True,
                check=False,
            )
            return done.returncode, done.stdout, done.stderr
        target = self.home / words[-1].partition(":")[2]
        paths = []
        for source in words[list(words).index("--") + 1 : -1]:
            paths.append(Path(shutil.copy(source, target)))
            self.sent.append(Path(source).name)
        if on_output is not None:
            on_output(b"   10  50%  1MB/s\r")
            on_output(b"   20 100%  1MB/s\n")
        try:
            self.after_send(paths)
        except ConnectionError as error:
            return 12, "", str(error)
        return 0, "", ""


def make_items(folder: Path, **texts: str) -> tuple[Item, ...]:
    folder.mkdir(exist_ok=True)
    items = []
    for name, text in texts.items():
        (folder / name).write_text(text)
        items.append(Item(folder / name, name, len(text), hashlib.sha256(text.encode()).hexdigest()))
    return tuple(items)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home of x"
    folder.mkdir()
    return folder


def delivery_by(shell: Shell, told: list[int] | None = None) -> Delivery:
    return Delivery(HOST, Ssh(), shell, True, (lambda n: None) if told is None else told.append)


def test_a_folder_arrives_whole_once(tmp_path: Path, home: Path) -> None:
    parcel = Parcel(
        PurePosixPath("run/p/metis_2"), make_items(tmp_path / "a", m="manifest", s="share"), True, "m"
    )
    shell, told = Shell(home), [0]
    receipt = delivery_by(shell, told).deliver(parcel)
    assert (receipt.num_files, receipt.num_bytes, receipt.sent_bytes) == (2, 13, 13)
    assert told == [0, 0, 10, 20, 13]
    place = home / "run/p"
    assert sorted(path.name for path in place.rglob("*")) == ["m", "metis_2", "s"]
    again = delivery_by(shell).deliver(parcel)
    assert (again.by, again.sent_bytes) == ("there already", 0)
    assert shell.sent == ["m", "s"]
    (place / "metis_2" / "s").write_text("shard")  # of the same size
    assert delivery_by(shell).deliver(parcel).sent_bytes == 13, "damage is mended"
    assert (place / "metis_2" / "s").read_text() == "share"
    assert [path.name for path in place.iterdir()] == ["metis_2"], "nothing hidden is left"


def test_a_broken_connection_leaves_nothing_that_looks_whole(tmp_path: Path, home: Path) -> None:
    parcel = Parcel(PurePosixPath("p"), make_items(tmp_path / "a", m="manifest", s="share"), True, "m")

    def cut(paths: list[Path]) -> None:
        paths[-1].write_text("sha")
        raise ConnectionError("connection unexpectedly closed")

    with pytest.raises(
        RemoteCommandError, match="10.0.0.1: sending failed with exit code 12: connection unexpectedly"
    ):
        delivery_by(Shell(home, cut)).deliver(parcel)
    assert not (home / "p").exists()
    shell = Shell(home)
    assert delivery_by(shell).deliver(parcel).sent_bytes == 5
    assert shell.sent == ["s"], "what had arrived is not sent again"

    def damage(paths: list[Path]) -> None:
        paths[-1].write_text("shape")

    other = Parcel(PurePosixPath("q"), parcel.items, True, "m")
    with pytest.raises(
        RemoteCommandError, match="10.0.0.1: q: what arrived is not what the manifest says.*s: FAILED"
    ):
        delivery_by(Shell(home, damage)).deliver(other)
    assert not (home / "q").exists()


def test_what_stands_there_is_replaced_by_its_like_only(tmp_path: Path, home: Path) -> None:
    first = Parcel(PurePosixPath("p"), make_items(tmp_path / "a", m="one", s="share 0"), True, "m")
    like = Parcel(PurePosixPath("p"), make_items(tmp_path / "b", m="one", t="share 1"), True, "m")
    other = Parcel(PurePosixPath("p"), make_items(tmp_path / "c", m="two", s="share 0"), True, "m")
    delivery = delivery_by(Shell(home))
    delivery.deliver(first)
    delivery.deliver(like)
    assert sorted(path.name for path in (home / "p").iterdir()) == ["m", "t"], (
        "a host keeps its own shares only"
    )
    with pytest.raises(
        RemoteCommandError, match="p: expected no partition or this very one, found another; pass --over"
    ):
        delivery.deliver(other)
    assert (home / "p" / "m").read_text() == "one"
    delivery.deliver(other, overwrite=True)
    assert (home / "p" / "m").read_text() == "two"
    assert [path.name for path in home.iterdir()] == ["p"]


def test_files_stand_beside_others(tmp_path: Path, home: Path) -> None:
    (home / "run" / "lib").mkdir(parents=True)
    (home / "run" / "mine.txt").write_text("mine")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("a")
    (tmp_path / "train.py").write_text("t")
    items = tuple(copy.extra_items([tmp_path / "train.py", tmp_path / "lib"]))
    parcel = Parcel(PurePosixPath("run"), items, is_folder=False)
    delivery_by(Shell(home)).deliver(parcel)
    delivery_by(Shell(home)).deliver(parcel)
    (home / "run" / "train.py").write_text("edited there")
    delivery_by(Shell(home)).deliver(parcel)
    assert (home / "run" / "train.py").read_text() == "t"
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    assert files == ["run/lib/a.py", "run/mine.txt", "run/train.py"]


def test_no_room_and_no_rights_are_told(tmp_path: Path, home: Path) -> None:
    (item,) = make_items(tmp_path / "a", s="share")
    parcel = Parcel(PurePosixPath("p"), (replace(item, num_bytes=1 << 60),), True)
    with pytest.raises(
        RemoteCommandError, match="10.0.0.1: p: the disk is full: 1,152,921,504,606,846,976 bytes"
    ):
        delivery_by(Shell(home)).deliver(parcel)

    def full(paths: list[Path]) -> None:
        raise ConnectionError("write failed: No space left on device (28)")

    with pytest.raises(RemoteCommandError, match="the disk is full: 5 bytes were to come"):
        delivery_by(Shell(home, full)).deliver(Parcel(PurePosixPath("p"), (item,), True))
    (home / "file").write_text("")
    with pytest.raises(RemoteCommandError, match="file/p: could not make the folder: .*another --workspace"):
        delivery_by(Shell(home)).deliver(Parcel(PurePosixPath("file/p"), (item,), True))


def test_the_command_brings_each_host_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    homes = {name: tmp_path / name for name in ("10.0.0.1", "10.0.0.2")}
    for folder in homes.values():
        folder.mkdir()

    def run(self: Runner, words: Sequence[str], *more: object) -> tuple[int, str, str]:
        name = words[-2] if words[0] == "ssh" else words[-1].partition(":")[0]
        return Shell(homes[name]).run(words, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "run", run)
    assert main(["partition", str(tmp_path / "p"), "--dataset", "karate", "--num-parts", "4"]) == 0
    (tmp_path / "hosts").write_text("10.0.0.1\n10.0.0.2\n")
    words = [
        "copy",
        "--hosts",
        str(tmp_path / "hosts"),
        "--part-root",
        str(tmp_path / "p"),
        "--workspace",
        "run",
    ]
    capsys.readouterr()
    assert main([*words, "--with", __file__]) == 0
    assert "│ 2 3   │" in capsys.readouterr().out
    files = {name: sorted(p.name for p in home.rglob("*") if p.is_file()) for name, home in homes.items()}
    script = Path(__file__).name
    assert files["10.0.0.1"] == ["000.safetensors", "001.safetensors", "manifest.json", script]
    assert files["10.0.0.2"] == ["002.safetensors", "003.safetensors", "manifest.json", script]
    assert main([*words, "--json"]) == 0
    assert [json.loads(line)["parts"] for line in capsys.readouterr().out.splitlines()] == [[0, 1], [2, 3]]
    shutil.rmtree(homes["10.0.0.2"])
    homes["10.0.0.2"].write_text("no folder")
    assert main(words) == 1
    assert main([*words[:4], str(tmp_path / "none"), *words[5:]]) == 1


# --- jobs

# In the place of Python: hands the leash on to the real one, and stands for torchrun.
_STUB = """#!/bin/sh
case "$2" in
partpar.cli.keep) exec {python} "$@" ;;
*) echo "torchrun $*"; echo "$MESSAGE" >&2; case "$*" in *"--node-rank 1 "*) exit "$CODE" ;; *) sleep "$SLEEP" ;; esac ;;
esac
"""


def _job(tmp_path: Path, **env: str) -> Job:
    stub = tmp_path / "python"
    stub.write_text(_STUB.format(python=sys.executable))
    stub.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "run").mkdir(exist_ok=True)
    settings = {"CODE": "0", "SLEEP": "0", "MESSAGE": "said", **env}
    return Job(str(tmp_path / "run"), ["train.py", "a b"], env=settings, python=str(stub), port=port)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ssh, "command", lambda self, host, words: [*words])


HOSTS = [Host("127.0.0.1"), Host("127.0.0.2")]


@pytest.mark.usefixtures("_here")
def test_a_job_runs_on_all_hosts_and_its_output_is_told_apart(tmp_path: Path) -> None:
    heard = io.StringIO()
    run_job(HOSTS, _job(tmp_path), Ssh(), heard)
    lines = sorted(heard.getvalue().splitlines())
    assert [line.partition("]")[0] for line in lines] == ["[127.0.0.1", "[127.0.0.2"]
    assert all(line.endswith(" train.py a b") for line in lines)


@pytest.mark.usefixtures("_here")
def test_failures_of_a_job_name_the_host_and_the_remedy(tmp_path: Path) -> None:
    def fails(job: Job, message: str) -> None:
        with pytest.raises(RemoteCommandError, match=message):
            run_job(HOSTS, job, Ssh(), io.StringIO())

    fails(
        _job(tmp_path, CODE="3", SLEEP="60"),
        "127.0.0.2: torchrun there failed with exit code 3; the other hosts were",
    )
    missing = _job(tmp_path, CODE="1", SLEEP="60", MESSAGE="ModuleNotFoundError: No module named 'partpar'")
    fails(missing, "127.0.0.[12]: .* there has no partpar; install it")
    fails(
        replace(missing, workspace=str(tmp_path / "none")),
        "127.0.0..: no folder .*none; bring one there first",
    )
    fails(replace(missing, python="/no/python"), "/no/python cannot be run there; name Python by --python")
    lost = _job(tmp_path, CODE="255", SLEEP="60", MESSAGE="Connection to 127.0.0.2 closed")
    fails(lost, "127.0.0.2: ssh lost the connection; the other hosts were ended")
    with socket.create_server(("", 0)) as server:
        fails(
            replace(missing, port=server.getsockname()[1]),
            "127.0.0.1: the workers cannot meet there: .*in use",
        )


def test_the_doctor_compares_hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    versions = {"127.0.0.1": "2.13", "127.0.0.2": "2.12"}

    def run(self: Runner, words: Sequence[str], *more: object) -> tuple[int, str, str]:
        found = [{"name": "torch", "state": "ok", "found": versions[words[-2]]}]
        found.append({"name": "free memory", "state": "ok", "found": "7 MiB"})
        return 0, "".join(json.dumps(check) + "\n" for check in found), ""

    monkeypatch.setattr(Runner, "run", run)
    (tmp_path / "hosts").write_text("127.0.0.1\n127.0.0.2\n")
    words = ["doctor", "--hosts", str(tmp_path / "hosts"), "--json"]
    assert main(words) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (torch,) = (check for check in found if check["name"] == "same torch")
    assert (torch["state"], torch["found"]) == (checks.FAIL, "127.0.0.1 2.13, 127.0.0.2 2.12")
    assert not any("ping" in check["name"] for check in found), "ranks that differ are not started"

    versions["127.0.0.2"] = "2.13"
    asked: list[list[str]] = []
    monkeypatch.setattr(doctor, "run_job", lambda hosts, job, ssh, output: asked.append([*job.program]))
    assert main(["partition", str(tmp_path / "p"), "--dataset", "karate", "--num-parts", "2"]) == 0
    capsys.readouterr()
    assert main([*words, "--part-root", str(tmp_path / "p")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [check["found"] for check in found if check["name"] == "memory"] == [
        "1 share(s) of 0 MiB, 7 MiB free"
    ] * 2
    assert [program[:3] for program in asked] == [
        ["-m", "partpar.cli.ping", name] for name in ("gloo", "rpc")
    ]
    (tmp_path / "hosts").write_text("10.0.0.1\n10.0.0.2\n")
    versions |= {"10.0.0.1": "2.13", "10.0.0.2": "2.13"}
    assert main(words) == 0
    assert "not tried" in capsys.readouterr().out, "nobody allowed the network"
