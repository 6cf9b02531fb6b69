r"""``pytest tests/faults`` runs what stands here, though the mark is left out by default, and ``--fault-times FILE`` writes
down how long each fault took until all had ended."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_times: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-times", metavar="FILE", help="write the seconds that each fault took, as CSV")


def pytest_configure(config: pytest.Config) -> None:
    asked = [Path(word.split("::")[0]).resolve() for word in config.args]
    only_here = bool(asked) and all(path == HERE or HERE in path.parents for path in asked)
    if only_here and "-m" not in config.invocation_params.args:
        config.option.markexpr = "not soak"


@pytest.fixture
def measured() -> Callable[[str, float], None]:
    r"""Keeps the longest time of a kind of fault, in seconds."""

    def keep(fault: str, seconds: float) -> None:
        _times[fault] = max(seconds, _times.get(fault, 0.0))

    return keep


@pytest.fixture(scope="session", autouse=True)
def _write_times(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    target = request.config.getoption("--fault-times", default=None)
    if target and _times:
        with Path(target).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["fault", "seconds"])
            writer.writerows([name, f"{seconds:.1f}"] for name, seconds in sorted(_times.items()))
