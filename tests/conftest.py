r"""Fixtures for all tests: the gang, world sizes and a quiet, single-threaded test process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported below

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gang import Gang

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background, and children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
WORLD_SIZES = [int(n) for n in os.environ.get("PARTPAR_TEST_WORLD_SIZES", "1,2,3,4").split(",")]


@pytest.fixture(scope="session")
def gang() -> Iterator[Gang]:
    r"""Four processes for the whole session; see ``gang.py``."""
    with Gang(4) as gang:
        yield gang


@pytest.fixture(params=WORLD_SIZES, ids=lambda n: f"{n}ranks")
def world_size(request: pytest.FixtureRequest) -> int:
    r"""1, 2, 3 and 4 ranks, or those that ``PARTPAR_TEST_WORLD_SIZES="2"`` names."""
    return int(request.param)


@pytest.fixture
def fresh_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""No share counts as checked before: what was read once is remembered in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    r"""Tests marked ``core_on(2, 4)`` run on those numbers of ranks in the core, on others among the soak tests;
    where ``PARTPAR_TEST_WORLD_SIZES`` names the numbers, on all of them."""
    if "PARTPAR_TEST_WORLD_SIZES" in os.environ:
        return
    for item in items:
        mark, call = item.get_closest_marker("core_on"), getattr(item, "callspec", None)
        if mark is not None and call is not None and call.params["world_size"] not in mark.args:
            item.add_marker(pytest.mark.soak)
