r"""Bytes of strangers, led by coverage: only errors of ours come out, in bounded time and memory.

``PARTPAR_FUZZ_SECONDS`` is what each target gets, 60 unless you say otherwise: 5 minutes in all, two targets at a time.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fuzz import ANSWER, MUTANTS, SEEDS, TARGETS, Targets

from partpar.serving import owner, transport

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
STARTS = 100  # seconds that a process may take to start, on busy cores
MUTANT_SECONDS = 60  # in which each must be found
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris to look for inputs: pip install 'partpar[fuzz]'"
)


def fuzz(folder: Path, target: str, seconds: float, *mutant: str) -> subprocess.CompletedProcess[str]:
    r"""A process that fuzzes one target."""
    folder.mkdir()
    command = [sys.executable, str(HERE / "fuzz.py"), target, f"{seconds:g}", *mutant]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, errors="replace", timeout=seconds + STARTS, check=False)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_once_stays_mended(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Seeds are good inputs, and those that once brought out what must not be."""
    for module in (owner, transport):
        monkeypatch.setattr(module, "MAX_BYTES", ANSWER)
    targets = Targets(tmp_path)
    accepted = [targets.run(target, path.read_bytes()) for path in sorted((SEEDS / target).iterdir())]
    assert True in accepted
    assert False in accepted


@needs_atheris
@pytest.mark.timeout(600)
@pytest.mark.timed("two targets that are fuzzed for 60 s each")
@pytest.mark.parametrize("targets", [TARGETS[:2], TARGETS[2:4], TARGETS[4:]], ids="-".join)
def test_inputs_that_coverage_leads_to(targets: tuple[str, ...], tmp_path: Path) -> None:
    seconds = float(os.environ.get("PARTPAR_FUZZ_SECONDS", "60"))
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda target: fuzz(tmp_path / target, target, seconds), targets)
    for target, run in zip(targets, runs, strict=True):
        inputs = [path.read_bytes() for name in ("crash-*", "timeout-*", "oom-*") for path in (tmp_path / target).glob(name)]
        assert run.returncode == 0, f"{target} on {inputs}: {run.stdout[-3000:]}{run.stderr[-6000:]}"
        done = re.search(r"^Done (\d+) runs in (\d+) second", run.stderr, re.MULTILINE)
        seen = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", run.stderr)
        assert done is not None and seen, run.stderr[-3000:]
        print(f"{target}: {done[1]} inputs in {done[2]} s; cov {seen[0][0]} to {seen[-1][0]}, ft {seen[-1][1]}, corpus {seen[-1][2]}")
        assert int(done[1]) > 100 * seconds, "too few inputs to say anything"


@needs_atheris
@pytest.mark.timeout(400)
def test_mutants_are_found(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda name: fuzz(tmp_path / name, MUTANTS[name][0], MUTANT_SECONDS, name), MUTANTS)
    for name, run in zip(MUTANTS, runs, strict=True):
        crashed = list((tmp_path / name).glob("*-*"))
        assert run.returncode != 0 and crashed, f"{name} was not found: {run.stderr[-3000:]}"


def test_mutants_are_listed() -> None:
    listed = (HERE.parent / "MUTANTS.rst").read_text()
    assert [name for name in MUTANTS if f"``{name}``" not in listed] == []
