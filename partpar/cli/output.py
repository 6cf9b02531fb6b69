r"""Results of commands for programs: JSON on standard output or in a file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STDOUT = "-"


def add_json_argument(parser: argparse.ArgumentParser, what: str) -> None:
    r"""Declares ``--json [FILE]``."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help=f"write {what} as JSON, an object a line, to FILE, or instead of tables where no FILE is named",
    )


def tables_wanted(target: str | None) -> bool:
    r"""Whether tables go to standard output."""
    return target != STDOUT


def write_json(target: str | None, records: Sequence[dict[str, Any]]) -> None:
    r"""Writes records to where ``--json`` says; a file appears whole or not at all."""
    if target is None:
        return
    text = "".join(json.dumps(record, default=str) + "\n" for record in records)
    if target == STDOUT:
        print(text, end="")
        return
    path = Path(target)
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
