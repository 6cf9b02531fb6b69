r"""Prints the n-th code block of README.rst, so that what is checked is what is printed there."""

from __future__ import annotations

import sys
from pathlib import Path


def code_blocks(text: str) -> list[str]:
    r"""The bodies of the ``code-block`` directives, in order, without their indentation."""
    blocks: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith(".. code-block::"):
            blocks.append("")
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            inside = False
        elif inside:
            blocks[-1] += line.strip() + "\n"
    return [block.strip() for block in blocks]


if __name__ == "__main__":
    readme = Path(__file__).resolve().parents[1] / "README.rst"
    print(code_blocks(readme.read_text(encoding="utf-8"))[int(sys.argv[1]) - 1])
