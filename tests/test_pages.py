r"""The Python of README and pages runs as it is printed: a page's blocks one after the other, on as many ranks as it
speaks of, in a folder that was empty. What a page takes for granted stands in its ``testsetup``, which is not shown."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import pytest
from gang import Gang, Worker

from partpar import datasets, training

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?P<before>[ *-]*)\.\. (?:code-block:: python|testsetup::)$")
# The first column of a table is another library's code, which is not here to run.
OTHERS = re.compile(r" *\* - ")
RANKS = {"README": 4, "quickstart": 4, "typed": 4}


def python_of(page: Path) -> list[tuple[int, str]]:
    r"""Line and text of each block, in order."""
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        match = BLOCK.match(line)
        if match is None or OTHERS.match(line):
            continue
        body: list[str] = []
        for below in lines[number:]:
            if below.strip() and len(below) - len(below.lstrip()) <= len(match["before"]):
                break
            body.append(below)
        found.append((number, textwrap.dedent("\n".join(body)) + "\n"))
    return found


def blocks_case(worker: Worker, page: str, folder: str) -> int:
    before, blocks = Path.cwd(), python_of(Path(page))
    names = {"worker": worker, "data": datasets.planted(400, num_classes=7)}
    os.chdir(folder)
    try:
        for line, text in blocks:
            code = compile("\n" * line + text, page, "exec")

            def run(code: object = code) -> None:
                exec(code, names)  # type: ignore[call-overload]

            # One process cuts; where all run the same line, the others find the partition there.
            if "partition_graph(" in text:
                training.first_rank(run, worker.group)
                if worker.rank == 0:
                    continue
            run()
    finally:
        os.chdir(before)
    return len(blocks)


PAGES = [path for path in (ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))) if python_of(path)]


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs_as_it_is_printed(gang: Gang, tmp_path: Path, page: Path) -> None:
    ranks = RANKS.get(page.stem, 2)
    assert set(gang.run(blocks_case, ranks, str(page), str(tmp_path), timeout=120)) == {len(python_of(page))}


def test_all_python_is_found() -> None:
    r"""Every block is either run or another library's."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    printed = [line for line in lines if re.search(r"code-block:: python|testsetup::", line)]
    others = [line for line in printed if OTHERS.match(line)]
    blocks = [text for page in PAGES for _, text in python_of(page)]
    assert len(others) == 8
    assert len(blocks) == len(printed) - len(others)
    assert all(text.strip() for text in blocks)
