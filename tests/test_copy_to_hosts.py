r"""``partpar copy`` over real ssh: what is interrupted, damaged, refused or full; see ``cluster.py``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import ADDRESSES, Cluster, free_port, missing_tools
from host_commands import HOME_TOOLS, NODES, RUN, cluster, copy_partition, partitions, whole_partitions

from partpar import GraphData, datasets

assert cluster and partitions  # the fixtures

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}: install openssh-server"
    ),
]


def test_without_rsync_at_the_far_end_scp_copies(cluster: Cluster, partitions: Path) -> None:
    cluster.only(ADDRESSES[0], *HOME_TOOLS)
    done = copy_partition(cluster, partitions, "--json")
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
    done = copy_partition(cluster, partitions)
    assert done.returncode == 1
    assert f"{ADDRESSES[1]}:{cluster.port}: sending failed with exit code" in done.stderr
    assert [path.parents[3] for path in whole_partitions(cluster)] == [cluster.homes[ADDRESSES[0]]]
    (hidden,) = (cluster.homes[ADDRESSES[1]] / RUN / "partitions/planted").glob(".metis_2-arriving-*")
    share = (partitions / "metis_2" / "001.safetensors").read_bytes()
    (hidden / "001.safetensors").write_bytes(b"?" + share[1 : len(share) // 2])
    shutil.copy(partitions / "metis_2" / "manifest.json", hidden)
    program.unlink()

    done = copy_partition(cluster, partitions, "--json")
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
    done = copy_partition(cluster, partitions)
    assert done.returncode == 1
    assert (
        f"{ADDRESSES[0]}:{cluster.port}: {RUN}/partitions/planted/metis_2: what arrived is not" in done.stderr
    )
    assert [path.parents[3] for path in whole_partitions(cluster)] == [cluster.homes[ADDRESSES[1]]]
    damaging.unlink()
    assert copy_partition(cluster, partitions).returncode == 0


def test_another_partition_is_replaced_only_if_told(
    cluster: Cluster, partitions: Path, tmp_path: Path
) -> None:
    assert copy_partition(cluster, partitions).returncode == 0
    GraphData.from_pyg_data(datasets.planted(NODES + 1)).partition_graph(tmp_path / "other", 2)
    done = copy_partition(cluster, tmp_path / "other")
    assert done.returncode == 1
    assert "expected no partition or this very one, found another; pass --overwrite" in done.stderr
    manifest = (partitions / "metis_2" / "manifest.json").read_bytes()
    assert [(path / "manifest.json").read_bytes() for path in whole_partitions(cluster)] == [manifest] * 2
    assert copy_partition(cluster, tmp_path / "other", "--overwrite").returncode == 0
    assert [(path / "manifest.json").read_bytes() == manifest for path in whole_partitions(cluster)] == [False] * 2


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
    done = copy_partition(cluster, partitions, config=config)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert (
        not any(path.is_relative_to(cluster.homes[ADDRESSES[0]]) for path in whole_partitions(cluster))
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
        done = copy_partition(cluster, partitions)
        assert done.returncode == 1
        message = (
            r"127\.0\.0\.2:\d+: run/partitions/planted/metis_2: the disk is full: [\d,]+ bytes were to come"
        )
        assert re.search(message, done.stderr), done.stderr
        assert [path.parents[3] for path in whole_partitions(cluster)] == [cluster.homes[ADDRESSES[0]]]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
