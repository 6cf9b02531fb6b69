r"""The pages build without a warning, what they show as output is so, and their commands run as they are printed."""

from __future__ import annotations

import doctest
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.rst"))
# A page whose commands need hosts is tested with hosts.
APART = ("cluster",)
TORCHRUN = "torchrun --standalone --nproc-per-node 2 "


def commands(page: str) -> list[str]:
    r"""The lines of a page's console blocks that begin with a prompt."""
    return re.findall(r"^ +\$ (.+)$", (DOCS / f"{page}.rst").read_text(encoding="utf-8"), re.MULTILINE)


WITH_COMMANDS = [page.stem for page in PAGES if page.stem not in APART and commands(page.stem)]


@pytest.mark.docs
def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quickstart.html").is_file()
    assert "two_ranks.svg" in (tmp_path / "concepts.html").read_text()


@pytest.mark.docs
@pytest.mark.parametrize("page", [p.stem for p in PAGES if ">>>" in p.read_text(encoding="utf-8")])
def test_what_pages_show_is_so(page: str) -> None:
    failed, tried = doctest.testfile(str(DOCS / f"{page}.rst"), module_relative=False)
    assert tried > 0
    assert failed == 0


def test_every_example_is_on_a_page_alone_and_by_two_workers() -> None:
    printed = [command for page in WITH_COMMANDS for command in commands(page)]
    for path in sorted((ROOT / "examples").glob("*.py")):
        name = f"examples/{path.name}"
        assert any(c.startswith(f"python {name}") for c in printed), f"no page runs {name} by one process"
        assert any(c.startswith(TORCHRUN + name) for c in printed), f"no page runs {name} by two workers"


def test_messages_on_the_page_of_troubles_are_those_of_the_code() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "partpar").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go over several lines
    text = (DOCS / "troubleshooting.rst").read_text(encoding="utf-8")
    messages = re.findall(r"^``(.+)``$", text, re.MULTILINE)
    assert len(messages) > 15
    of_hosts = (DOCS / "cluster.rst").read_text(encoding="utf-8").partition("When something is missing")[2]
    messages += re.findall(r"^``(.+?)``  ", of_hosts, re.MULTILINE)
    assert "the disk is full" in messages
    for message in messages:
        assert message in code, f"no message of the code says {message!r}"


@pytest.mark.docs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_run_as_they_are_printed(page: str, tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "_build", "*.egg-info")
    for name in ("examples", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    # What pages call python, torchrun and partpar are those that run this test.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    for command in commands(page):
        words = shlex.split(command)
        assert words[0] in ("python", "torchrun", "partpar"), f"{page}: a test does not know how to run {command!r}"
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if page == "examples":
        assert "polyline" in (copy / "report.html").read_text(encoding="utf-8")
        for run in ("two", "snapshots", "typed"):
            assert any((copy / "runs" / run).iterdir()), "TensorBoard's events"


@pytest.fixture
def printed_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    r"""What a script prints for ``--help``, run in this process, which has torch already."""

    def run(script: Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        monkeypatch.syspath_prepend(str(script.parent))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert not end.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.docs
@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_say_how_they_are_run(script: Path, printed_help: Callable[[Path], str]) -> None:
    said = printed_help(script)
    assert f"python benchmarks/{script.name}" in said
    assert "--json" in said


@pytest.mark.docs
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_keep_logs_alike(script: Path, printed_help: Callable[[Path], str]) -> None:
    said = printed_help(script)
    assert "--metrics" in said
    assert "--logdir" in said
