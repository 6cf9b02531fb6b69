r"""What benchmarks of several contenders have in common: inputs that are kept, figures of rounds, agreement, pages."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from partpar import GraphData

TOLERANCE = 1e-4  # relative, of float32 losses


def kept(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    r"""Facts about the inputs in a folder, made now or an earlier time."""
    facts = folder / "facts.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        facts.write_text(json.dumps(make()))
    told: dict[str, Any] = json.loads(facts.read_text())
    return told


def cut(graph: GraphData, folder: Path, parts: Iterable[int], node_weight: list[str] | None = None) -> dict[int, Any]:
    r"""Cuts a graph by METIS; returns cut, halo and balance for each number of parts."""
    told = {}
    for count in parts:
        path = graph.partition_graph(folder, count, node_weight, overwrite=True)
        report = json.loads((path / "manifest.json").read_text())["report"]
        told[count] = {name: report[name] for name in ("edge_cut", "halo_share", "balance")}
    return told


def summarise(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    r"""Medians over rounds; of each epoch the slowest rank, of each round the largest."""
    epochs = [max(times) for ranks in rounds for times in zip(*(r["seconds"] for r in ranks), strict=True)]
    row: dict[str, Any] = {
        "seconds": statistics.median(epochs),
        "peak": statistics.median(max(r["peak"] for r in ranks) for ranks in rounds),
        "losses": rounds[0][0]["losses"],
        "gradient": rounds[0][0]["gradient"],
    }
    for name, pick in (("visible", max), ("hidden", max), ("bytes_sent", sum), ("dense", max)):
        if name in rounds[0][0]:
            row[name] = statistics.median(pick(r[name] for r in ranks) for ranks in rounds)
    return row


def agree(results: dict[str, dict[str, Any]], what: str) -> float:
    r"""The largest relative difference of a loss in the first epochs.

    Raises:
        AssertionError: Somebody computes something else.
    """
    worst, told = 0.0, {name: row["losses"][:3] for name, row in results.items()}
    reference = next(iter(told.values()))
    for name, losses in told.items():
        for ours, theirs in zip(losses, reference, strict=False):
            worst = max(worst, abs(ours - theirs) / abs(theirs))
        assert worst <= TOLERANCE, f"{what}: {name} has losses {losses}, the first has {reference}"
    return worst


def list_table(title: str, rows: Iterable[Sequence[str]]) -> list[str]:
    r"""Lines of a table for the documentation, its header first."""
    lines = [f".. list-table:: {title}".rstrip(), "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return lines
