r"""Mistakes put into ``partpar copy``, ``launch`` and ``doctor`` on purpose, each of which a check must notice; listed
in ``MUTANTS.rst``. No server is needed: a shell of this machine stands in the place of ssh."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from test_delivery import HOST, Shell, delivery_by, make_items
from test_launch import FAMILY, is_alive

from partpar.cli import checks, copy, delivery, doctor, fleet, hosts, keep, launch
from partpar.cli.checks import FAIL, OK, Check
from partpar.cli.delivery import Delivery, Parcel
from partpar.cli.hosts import Host, HostFileError
from partpar.cli.launch import Job
from partpar.cli.ssh import RemoteCommandError, Ssh

Patch = pytest.MonkeyPatch
HOSTS = [Host("10.0.0.1"), Host("10.0.0.2")]


# --- what must hold


def hosts_get_their_own_parts(folder: Path) -> None:
    assert [list(copy.parts_of_host(n, 2, 4)) for n in (0, 1)] == [[0, 1], [2, 3]]


def _arrived(folder: Path, **texts: str) -> tuple[Path, Parcel]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return home, Parcel(PurePosixPath("p"), make_items(folder / "source", **texts), True, "m")


def what_looks_whole_is_whole(folder: Path) -> None:
    home, parcel = _arrived(folder, m="manifest", s="share")

    def cut(paths: list[Path]) -> None:
        paths[-1].write_text("sha")
        raise ConnectionError("gone")

    def damage(paths: list[Path]) -> None:
        paths[-1].write_text("shape")

    for harm in (cut, damage):
        with pytest.raises(RemoteCommandError):
            delivery_by(Shell(home, harm)).deliver(parcel)
        assert not (home / "p").exists()
    delivery_by(Shell(home)).deliver(parcel)
    assert [path.name for path in home.iterdir()] == ["p"]


def what_arrived_is_not_sent_again(folder: Path) -> None:
    home, parcel = _arrived(folder, m="manifest", s="share")

    def cut(paths: list[Path]) -> None:
        paths[-1].write_text("sha")
        raise ConnectionError("gone")

    with pytest.raises(RemoteCommandError):
        delivery_by(Shell(home, cut)).deliver(parcel)
    shell = Shell(home)
    delivery_by(shell).deliver(parcel)
    assert shell.sent == ["s"]


def another_partition_is_left_alone(folder: Path) -> None:
    home, parcel = _arrived(folder, m="one")
    delivery_by(Shell(home)).deliver(parcel)
    _, other = _arrived(folder, m="two")
    with pytest.raises(RemoteCommandError, match="found another"):
        delivery_by(Shell(home)).deliver(other)


def a_full_disk_is_told_before_anything_is_sent(folder: Path) -> None:
    home, parcel = _arrived(folder, s="share")
    shell = Shell(home)
    with pytest.raises(RemoteCommandError, match="the disk is full"):
        delivery_by(shell).deliver(replace(parcel, items=(replace(parcel.items[0], num_bytes=1 << 60),)))
    assert shell.sent == []


def each_host_has_its_rank(folder: Path) -> None:
    words = [Job("run", ["train.py"], nproc_per_node=2).words(HOSTS, number) for number in (0, 1)]
    assert [one[one.index("--node-rank") + 1] for one in words] == ["0", "1"]
    assert {one[one.index("--master-addr") + 1] for one in words} == {"10.0.0.1"}


def words_reach_the_far_end_as_they_are(folder: Path) -> None:
    assert shlex.split(Ssh().command(HOST, ["echo", "a b; rm x"])[-1]) == ["echo", "a b; rm x"]


def no_option_passes_for_a_host(folder: Path) -> None:
    (folder / "hosts").write_text("-oProxyCommand=x\n")
    with pytest.raises(HostFileError):
        hosts.read_hosts(folder / "hosts")


def the_network_must_be_allowed(folder: Path) -> None:
    with pytest.raises(RemoteCommandError, match="--allow-remote"):
        launch.check_job(HOSTS, Job("run", ["train.py"]), allow_remote=False)


def the_first_failure_ends_all(folder: Path) -> None:
    slow = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    members = [fleet.Member(name, words, io.StringIO()) for name, words in (("a", slow), ("b", ["false"]))]
    try:
        assert fleet.run_fleet(members) is members[1]
        assert members[0].process.poll() is not None
    finally:
        members[0].process.kill()
        members[0].process.wait()


def hosts_that_differ_fail(folder: Path) -> None:
    found = [Check("torch", OK, version, host=host) for host, version in (("a", "2.13"), ("b", "2.12"))]
    assert doctor._agreement("torch", found).state == FAIL


def shares_that_do_not_fit_fail(folder: Path) -> None:
    manifest: Any = type("Sizes", (), {"shares": [type("Record", (), {"num_bytes": 10 << 20})] * 2})
    assert checks.memory(manifest, [0, 1], free=15 << 20).state == FAIL
    assert checks.memory(manifest, [0, 1], free=99 << 20).state == OK


# --- mistakes


def bring_all_parts(patch: Patch) -> None:
    patch.setattr(copy, "parts_of_host", lambda number, num_hosts, num_parts: range(num_parts))


def compare_no_checksums(patch: Patch) -> None:
    script = delivery.PUBLISH_FOLDER.replace("sha256sum --check --quiet --strict -", "cat >/dev/null")
    patch.setattr(delivery, "PUBLISH_FOLDER", script)


def arrive_in_place(patch: Patch) -> None:
    patch.setattr(Parcel, "hidden", property(lambda self: self.place))


def leave_leftovers(patch: Patch) -> None:
    patch.setattr(delivery, "PUBLISH_FOLDER", delivery.PUBLISH_FOLDER.replace('mv -T -- "$s" "$f"', 'cp -r -- "$s" "$f"').replace('rm -rf -- "${s%-*}"-*', "true"))


def _found_with(patch: Patch, **changes: object) -> None:
    look = Delivery._look
    patch.setattr(Delivery, "_look", lambda self, parcel: replace(look(self, parcel), **changes))


def forget_what_arrived(patch: Patch) -> None:
    _found_with(patch, staged={})


def ask_for_no_room(patch: Patch) -> None:
    _found_with(patch, free=None)


def replace_whatever_is_there(patch: Patch) -> None:
    patch.setattr(Delivery, "_check_replaceable", lambda *args: None)


def one_rank_for_all(patch: Patch) -> None:
    words = Job.words
    patch.setattr(Job, "words", lambda self, hosts, number: words(self, hosts, 0))


def quote_nothing(patch: Patch) -> None:
    patch.setattr(Ssh, "command", lambda self, host, words: ["ssh", "--", host.target, " ".join(words)])


def take_any_name(patch: Patch) -> None:
    patch.setattr(hosts, "_matching", lambda path, line, what, text, pattern: text)


def allow_every_network(patch: Patch) -> None:
    patch.setattr(Host, "is_loopback", True)


def let_the_others_run(patch: Patch) -> None:
    patch.setattr(fleet, "_stop", lambda members: None)


def compare_no_versions(patch: Patch) -> None:
    patch.setattr(doctor, "_agreement", lambda name, found: Check(f"same {name}", OK, "", host="all"))


def count_the_first_share_only(patch: Patch) -> None:
    memory = checks.memory
    patch.setattr(checks, "memory", lambda manifest, parts, free: memory(manifest, parts[:1], free))


MUTANTS: list[tuple[Callable[[Patch], None], Callable[[Path], None]]] = [
    (bring_all_parts, hosts_get_their_own_parts),
    (compare_no_checksums, what_looks_whole_is_whole),
    (arrive_in_place, what_looks_whole_is_whole),
    (leave_leftovers, what_looks_whole_is_whole),
    (forget_what_arrived, what_arrived_is_not_sent_again),
    (replace_whatever_is_there, another_partition_is_left_alone),
    (ask_for_no_room, a_full_disk_is_told_before_anything_is_sent),
    (one_rank_for_all, each_host_has_its_rank),
    (quote_nothing, words_reach_the_far_end_as_they_are),
    (take_any_name, no_option_passes_for_a_host),
    (allow_every_network, the_network_must_be_allowed),
    (let_the_others_run, the_first_failure_ends_all),
    (compare_no_versions, hosts_that_differ_fail),
    (count_the_first_share_only, shares_that_do_not_fit_fail),
]


@pytest.mark.parametrize(("mutate", "check"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_mutant_is_noticed(
    tmp_path: Path, monkeypatch: Patch, mutate: Callable[[Patch], None], check: Callable[[Path], None]
) -> None:
    (tmp_path / "well").mkdir()
    (tmp_path / "ill").mkdir()
    check(tmp_path / "well")
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RemoteCommandError, pytest.fail.Exception, TypeError)):
        check(tmp_path / "ill")


# --- the far end's leash, which is a program


LEASH = {
    "leave_orphans": ("keep.descendants = lambda pid: set()", signal.SIG_DFL),
    "ask_politely_for_ever": ("keep.signal.SIGKILL = keep.signal.SIGTERM", signal.SIG_IGN),
    "hold_on_without_a_launcher": ("keep._wait = lambda child, stop: child.wait()", signal.SIG_DFL),
    "look_at_no_port": ("keep.port_problem = lambda port: None", None),
}
_PROGRAM = "import sys; from partpar.cli import keep; keep._GRACE = 0.3; {}; sys.exit(keep.main(sys.argv[1:]))"


def leash_holds(mutant: str, on_sigterm: int | None, seconds: float = 20) -> bool:
    if on_sigterm is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            words = ["--listens-at", str(server.getsockname()[1]), "true"]
            done = subprocess.run(_kept(mutant, words), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, check=False)
        return done.returncode == keep.PORT_TAKEN
    command = _kept(mutant, ["--", sys.executable, "-c", FAMILY, str(int(on_sigterm))])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.stdin.close()  # the launcher is gone
        end = time.monotonic() + seconds
        while time.monotonic() < end and (process.poll() is None or any(map(is_alive, pids))):
            time.sleep(0.05)
        held = process.poll() is not None and not any(map(is_alive, pids))
        for pid in (*pids, process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return held


def _kept(mutant: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", _PROGRAM.format(mutant or "pass"), *words]


@pytest.mark.parametrize("name", LEASH)
def test_mutant_of_the_leash_is_noticed(name: str) -> None:
    mutant, on_sigterm = LEASH[name]
    assert not leash_holds(mutant, on_sigterm, seconds=2)


@pytest.mark.parametrize("on_sigterm", [signal.SIG_DFL, signal.SIG_IGN, None])
def test_without_a_mutant_the_leash_holds(on_sigterm: int | None) -> None:
    assert leash_holds("", on_sigterm)


def test_all_are_listed() -> None:
    listed = Path(__file__).with_name("MUTANTS.rst").read_text()
    names = [*(mutate.__name__ for mutate, _ in MUTANTS), *LEASH]
    assert [name for name in names if f"``{name}``" not in listed] == []
