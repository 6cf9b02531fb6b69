r"""The commands of several hosts, as tests call them over a :class:`~cluster.Cluster`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster

from partpar import GraphData, datasets

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


def partpar_words(command: str, cluster: Cluster, *more: str, config: Path | None = None) -> list[str]:
    words = [sys.executable, "-m", "partpar.cli.main", command, "--hosts", str(cluster.hosts_file)]
    return [*words, "--ssh-config", str(config or cluster.ssh_config), "--workspace", RUN, *more]


def run_words(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=env, **options)  # type: ignore[call-overload]


def copy_partition(
    cluster: Cluster, partitions: Path, *more: str, config: Path | None = None
) -> subprocess.CompletedProcess[str]:
    where = ["--part-root", str(partitions), "--rel-data-path", "partitions/planted"]
    return run_words(partpar_words("copy", cluster, *where, *more, config=config))


def launch_words(cluster: Cluster, port: int, *program: str) -> list[str]:
    return partpar_words("launch", cluster, "--python", sys.executable, "--port", str(port), "--", *program)


def files_in(home: Path) -> set[str]:
    return {
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def whole_partitions(cluster: Cluster) -> list[Path]:
    r"""Partitions that look whole at any host."""
    return [path for home in cluster.homes.values() for path in home.glob(f"{RUN}/partitions/planted/[!.]*")]


def processes_below(cluster: Cluster) -> list[str]:
    r"""Processes that work in a host's home."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(cluster.folder / "homes") in str((path / "cwd").readlink()):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
