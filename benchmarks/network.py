r"""The full graph over slower networks: how well exchanges hide, and how well their cost is predicted.

.. code-block:: bash

    python benchmarks/network.py --json network.json --rst docs/network.rst

Two ranks of one machine train a 3-layer GCN while their exchanges take as long as they would at 1, 10 and 100 Gbit/s.
A cost model is fitted to epochs without that limit, on graphs of several sizes, and predicts those with it, which it has
not seen. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from full_graph import CLASSES, CONTENDERS, prepare, run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.contest import list_table
from support.launch import launch

from partpar.training.cost import (
    Case,
    Network,
    Prediction,
    Rates,
    Training,
    even_parts,
    fit,
    parts_of,
    predict,
)

TWO_RANKS = next(c for c in CONTENDERS if c.name == "partpar 2 x 1")
BANDWIDTHS = (1.0, 10.0, 100.0)
LATENCY = 50e-6
# Nodes, edges, features, hidden width and mixing of the graphs that the model is fitted to, in units of --unit nodes.
SIZES = (
    (1, 20, 128, 128, 0.03),
    (2, 20, 128, 128, 0.03),
    (2, 40, 128, 128, 0.03),
    (1, 40, 64, 64, 0.03),
    (1, 20, 128, 256, 0.03),
    (1, 20, 128, 128, 0.2),
    (2, 40, 256, 64, 0.1),
    (0.5, 5, 128, 128, 0.03),
)
UNSEEN = (4, 80, 128, 128, 0.03)  # predicted only
PAPERS = {"nodes": 111e6, "edges": 1.6e9, "machines": 32, "ranks": 2, "classes": 172}
CLAIM = 1.15


def graph(args: argparse.Namespace, size: tuple[float, ...]) -> tuple[Path, argparse.Namespace]:
    r"""Makes and cuts a graph of a size, in units."""
    nodes, edges, features, hidden, mixing = size
    own = argparse.Namespace(**vars(args))
    own.nodes, own.edges, own.features = int(nodes * args.unit), int(edges * args.unit), int(features)
    own.hidden, own.mixing, own.communities = int(hidden), mixing, 64
    return prepare(own, (2,))[0], own


def overlap(args: argparse.Namespace) -> list[dict[str, Any]]:
    r"""Sums and epochs on each network, of the slowest rank, on parts with little boundary."""
    folder, _ = graph(args, (4, 80, 128, 128, 0.01))
    rows = []
    for gbit in BANDWIDTHS:
        case = {
            "folder": str(folder),
            "gbit": gbit,
            "latency": LATENCY,
            "hidden": 128,
            "classes": CLASSES,
            "rounds": args.rounds,
        }
        ranks = launch("overlap.py", case, 2, 1)
        for rank in ranks:
            assert rank["bytes"][0] == rank["bytes"][1], (
                f"bytes on the wire and as predicted: {rank['bytes']}"
            )
            assert rank["exchanges_of_first_layer"] == 0, "the first layer exchanges"
        boundary = 0.0
        for width in ranks[0]["sums"]:
            row = {name: max(rank["sums"][width][name] for rank in ranks) for name in ranks[0]["sums"][width]}
            boundary += row["boundary"]
            rows.append({"gbit": gbit, "what": f"sum of {width} columns", **row})
        unlimited, limited = (
            max(rank["epochs"][name] for rank in ranks) for name in ("unlimited", "limited")
        )
        exchange = max(rank["exchange"] for rank in ranks)
        work = {"exchange": exchange, "interior": unlimited - boundary, "boundary": boundary, "step": limited}
        rows.append({"gbit": gbit, "what": "epoch of GCN", **work})
    for row in rows:
        row["share"] = (row["step"] - row["boundary"]) / max(row["exchange"], row["interior"])
    return rows


def measure(args: argparse.Namespace, size: tuple[float, ...], gbits: tuple[float | None, ...]) -> list[Case]:
    r"""Epochs of two ranks on a graph, over each network; the slowest rank's."""
    folder, own = graph(args, size)
    parts = parts_of(json.loads((folder / "metis_2" / "manifest.json").read_text())["report"])
    training = Training("gcn", own.features, own.hidden, CLASSES)
    cases = []
    for gbit in gbits:
        ranks = run(TWO_RANKS, "gcn", folder, own, gbit=gbit, latency=0.0 if gbit is None else LATENCY)
        seconds = statistics.median(max(both) for both in zip(*(r["seconds"] for r in ranks), strict=True))
        network = None if gbit is None else Network(gbit, LATENCY)
        cases.append(Case(parts, training, network, seconds, max(r["peak"] for r in ranks)))
    return cases


def errors(cases: list[Case], predictions: list[Prediction]) -> dict[str, float]:
    r"""Median and largest relative errors."""
    told = {}
    for name in ("seconds", "memory"):
        off = [abs(getattr(p, name) / getattr(c, name) - 1) for c, p in zip(cases, predictions, strict=True)]
        told |= {f"{name}_median_error": statistics.median(off), f"{name}_largest_error": max(off)}
    return told


def papers(rates: Rates) -> list[dict[str, float]]:
    r"""What a graph of the size of ogbn-papers100M would take on machines like this one, for several cuts."""
    training = Training("gcn", 128, 128, int(PAPERS["classes"]))
    rows = []
    for halo, cut in ((0.25, 0.1), (0.5, 0.2), (1.0, 0.4)):
        parts = even_parts(
            PAPERS["nodes"], PAPERS["edges"], int(PAPERS["machines"] * PAPERS["ranks"]), halo, cut
        )
        for gbit in (10.0, 100.0):
            found = predict(parts, training, Network(gbit, LATENCY, int(PAPERS["ranks"])), rates)
            rows.append({"halo": halo, "edge cut": cut, "gbit": gbit, **asdict(found)})
    return rows


def show(title: str, rows: list[dict[str, Any]], console: Console) -> list[str]:
    r"""Prints rows as a table and returns them as one of reStructuredText."""

    def cell(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if value < 1e4 else f"{value:.3e}"

    table, cells = Table(*rows[0], title=title), [[cell(value) for value in row.values()] for row in rows]
    for row in cells:
        table.add_row(*row)
    console.print(table)
    return [*list_table(title, [list(rows[0]), *cells]), ""]


def main() -> None:
    r"""Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unit", type=int, default=50_000, help="nodes of the smallest graph but one")
    parser.add_argument("--rounds", type=int, default=9, help="of the sums and epochs")
    parser.add_argument("--epochs", type=int, default=8, help="of each case of the cost model")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where cut graphs are kept"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument(
        "--rates", type=Path, help="write the fitted rates, for partpar inspect --predict --rates"
    )
    parser.add_argument("--rst", type=Path, help="write the page of the documentation")
    args = parser.parse_args()
    console = Console(stderr=True, width=150)

    hidden = overlap(args)
    cases: list[Case] = []
    for i, size in enumerate(track([*SIZES, UNSEEN], "cost", console=console)):
        with_limits = i in (0, 3, 5) or size is UNSEEN
        cases += measure(args, size, (None, *BANDWIDTHS) if with_limits else (None,))
    fitted = [case for case in cases[: -1 - len(BANDWIDTHS)] if case.network is None]
    unseen = [case for case in cases if case not in fitted]
    rates = fit(fitted)
    found = {id(case): predict(case.parts, case.training, case.network, rates) for case in cases}
    told: dict[str, Any] = {
        **{f"fitted_{k}": v for k, v in errors(fitted, [found[id(c)] for c in fitted]).items()},
        **{f"unseen_{k}": v for k, v in errors(unseen, [found[id(c)] for c in unseen]).items()},
    }
    slow = [row for row in hidden if row["gbit"] == 1.0 and row["exchange"] <= row["interior"]]
    told["overlap_worst_share_1_gbit"] = max(row["share"] for row in slow) if slow else None

    lines = [
        "Slower networks",
        "===============",
        "",
        *__doc__.split("\n\n", 1)[1].rsplit(" The last", 1)[0].splitlines(),
        "",
    ]
    lines += [
        "*Share* is (step - boundary) / max(exchange, interior): 1 is a perfect overlap, at most 1.15 is asked for at 1 Gbit/s",
        "where the interior takes longer than the exchange. The first layer sends nothing, and bytes on the wire are those",
        "predicted. Seconds, forwards and backwards, of the slowest rank.", "",
    ]  # fmt: skip
    lines += show("Overlap", hidden, console)
    lines += show("Measured and predicted", [
        {
            "nodes": round(sum(p.owned for p in c.parts)), "edges": round(sum(p.edges for p in c.parts)),
            "features": c.training.features, "hidden": c.training.hidden,
            "gbit": "own" if c.network is None else c.network.gbit, "fitted": "yes" if c in fitted else "no",
            "s": c.seconds, "predicted s": found[id(c)].seconds, "visible s": found[id(c)].visible,
            "MB": c.memory / 1e6, "predicted MB": found[id(c)].memory / 1e6,
        } for c in cases
    ], console)  # fmt: skip
    lines += [
        f"{name.replace('_', ' ').capitalize()}: {value:.1%}.\n"
        for name, value in told.items()
        if "error" in name
    ]
    lines += show(
        f"A graph of {PAPERS['nodes']:.3g} nodes and {PAPERS['edges']:.3g} edges, 128 features, on {PAPERS['machines']} such "
        f"machines of {PAPERS['ranks']} ranks: assumed cuts and predictions (per epoch; memory per rank)",
        papers(rates), console,
    )  # fmt: skip
    share = told["overlap_worst_share_1_gbit"]
    if share is not None:
        console.print(
            f"{'PASS' if share <= CLAIM else 'FAIL'}  overlap on 1 Gbit/s: {share:.3f}, at most {CLAIM}"
        )
    if args.rates:
        rates.write(args.rates)
    if args.rst:
        args.rst.write_text("\n".join(lines))
    whole = {**told, "overlap": hidden, "rates": asdict(rates), "papers": papers(rates)}
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
