r"""``pytest tests/faults`` runs what stands here, though the mark is left out by default, and ``--fault-times FILE`` writes
down how long each fault took until all had ended, and how long each test marked ``timed("what it does")``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_times: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-times", metavar="FILE", help="write the seconds that each fault took, as CSV")


def pytest_configure(config: pytest.Config) -> None:
    asked = [Path(word.split("::")[0]).resolve() for word in config.args]
    only_here = bool(asked) and all(path == HERE or HERE in path.parents for path in asked)
    config.addinivalue_line("markers", "timed(what): the seconds of its longest case are written down by --fault-times")
    if only_here and "-m" not in config.invocation_params.args:
        config.option.markexpr = "not soak"


@pytest.fixture
def measured() -> Callable[[str, float], None]:
    r"""Keeps the longest time of a kind of fault, in seconds."""

    def keep(fault: str, seconds: float) -> None:
        _times[fault] = max(seconds, _times.get(fault, 0.0))

    return keep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    mark = item.get_closest_marker("timed")
    if mark is not None and report.when == "call" and report.passed:
        _times[mark.args[0]] = max(call.duration, _times.get(mark.args[0], 0.0))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    r"""Rows of tests that did not run now stay as they are."""
    target = session.config.getoption("--fault-times", default=None)
    if not target or not _times:
        return
    path, rows = Path(target), {name: f"{s:.1f}" if s >= 0.1 else "< 0.1" for name, s in _times.items()}
    if path.exists():
        with path.open(newline="") as file:
            rows = dict(list(csv.reader(file))[1:]) | rows
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["fault", "seconds"])
        writer.writerows(sorted(rows.items(), key=lambda row: row[0].lower()))
