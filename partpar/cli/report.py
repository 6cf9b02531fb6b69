r"""``partpar report``: a training's log as one page that needs nothing else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from partpar.cli import charts
from partpar.cli.quality import size_text
from partpar.training.run_log import Run, RunLogError, read_runs

EXAMPLE = "partpar report run.jsonl -o report.html"
TIMES = ("seconds", "exchange_seconds")
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
svg { margin: .5em 1em .5em 0; border: 1px solid #ddd; background: #fff; }
svg text { font: 12px system-ui, sans-serif; } svg .title { font-weight: 600; font-size: 13px; }
svg .grid { stroke: #e5e5e5; } table { border-collapse: collapse; margin: .5em 0; }
td, th { border: 1px solid #ddd; padding: .2em .7em; text-align: right; } td:first-child, th:first-child { text-align: left; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument("log", type=Path, help="JSON lines, as --metrics of the examples writes them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HTML", help="page to write")


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Writes the page."""
    runs = read_runs(args.log)
    page = render(runs, args.log.name)
    scratch = args.output.with_name(f".{args.output.name}-{os.getpid()}")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(args.output)
    console.print(f"{len(runs)} run(s) drawn to {args.output}", highlight=False, soft_wrap=True)
    return 0


def render(runs: list[Run], name: str) -> str:
    r"""The page of some runs.

    Args:
        runs: As read from a log.
        name: Of the log, for the heading.
    """
    body = [f"<h1>{escape(name)}</h1>"]
    for number, one in enumerate(runs, 1):
        if len(runs) > 1:
            body.append(f"<h2>Run {number} of {len(runs)}</h2>")
        body += _run(one)
    # Nothing is fetched from anywhere, and the browser is told so.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(name)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _run(one: Run) -> list[str]:
    names = dict.fromkeys(name for epoch in one.epochs for name in epoch if name != "epoch")
    curves = {name: curve for name in names if (curve := one.curve(name))}
    if not curves:
        raise RunLogError("expected numbers beside the epochs, found none")
    body = ["<h3>Learning curves</h3>", _summary(one, curves)]
    losses = {name: curve for name, curve in curves.items() if "loss" in name}
    scores = {name: curve for name, curve in curves.items() if name not in losses and name not in TIMES}
    times = {name.replace("_", " "): curves[name] for name in TIMES if name in curves}
    for title, group in (("loss", losses), ("metric", scores), ("seconds an epoch on rank 0", times)):
        if group:
            body.append(charts.lines(title, "epoch", group))
    body.append("<h3>Time per phase and rank</h3>")
    phases = one.phase_seconds
    if phases:
        ranks = [f"rank {rank}" for rank in range(len(next(iter(phases.values()))))]
        body.append(charts.stacked_bars("seconds of the whole run", "s", ranks, phases))
    else:
        body.append("<p>The log does not tell.</p>")
    body.append("<h3>Traffic between ranks</h3>")
    traffic: list[list[float]] = one.end.get("traffic") or []
    if len(traffic) > 1:
        body.append(charts.matrix("rows sent in one exchange", "from rank", "to rank", traffic))
    else:
        body.append("<p>None: there was one worker, or the log does not tell.</p>")
    return body


def _summary(one: Run, curves: Mapping[str, charts.Points]) -> str:
    rows: dict[str, Any] = {"epochs": len(one.epochs)}
    for name, curve in curves.items():
        values = [y for _, y in curve]
        rows[f"{name}, last (lowest to highest)"] = f"{values[-1]:.6g} ({min(values):.6g} to {max(values):.6g})"
    for rank, peak in enumerate(one.end.get("peak_bytes") or []):
        rows[f"peak memory of rank {rank}"] = size_text(peak)
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"
