r"""An epoch of training on the full graph: PyG in one process, partpar on 1, 2 and 4 ranks.

.. code-block:: bash

    python benchmarks/full_graph.py --json full_graph.json --rst docs/full_graph_speed.rst

A generated graph with communities and heavy-tailed degrees is cut once. Then all contenders take turns, round
after round, each in fresh processes; an epoch is forward pass, loss, backward pass and Adam's step over the
whole graph, its time the median over all rounds, of the slowest rank. Peak memory is that of the largest
rank, above what a process holds once torch and PyG are imported. All contenders start from the same weights
and must agree on the first losses. Ours run with huge pages, as workers do that `partpar` starts. The last
line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from support.contenders import model_arguments
from support.contest import agree, cut, kept, list_table, summarise
from support.launch import launch
from support.targets import Claim, claims, ratios

from partpar import GraphData
from partpar.datasets import planted

HERE = Path(__file__).parent
CLASSES = 32


@dataclass(frozen=True)
class Contender:
    r"""Who trains, on how many ranks with how many threads each, and how."""

    name: str
    who: str
    ranks: int = 1
    threads: int = 2
    edges: str = "edge_index"
    tuned: bool = False
    keep_halo: bool = True
    recompute: bool = False
    models: tuple[str, ...] = ("gcn", "sage", "gat")


CONTENDERS = (
    Contender("PyG edge_index", "pyg"),
    Contender("PyG adj_t", "pyg", edges="adj_t", models=("gcn", "sage")),
    Contender("PyG adj_t, huge pages", "pyg", edges="adj_t", tuned=True, models=("gcn", "sage")),
    Contender("partpar 1 x 2", "partpar", tuned=True),
    Contender("partpar 2 x 1", "partpar", ranks=2, threads=1, tuned=True),
    Contender("partpar 4 x 1", "partpar", ranks=4, threads=1, tuned=True),
    Contender(
        "partpar 2 x 1, features sent", "partpar", 2, 1, tuned=True, keep_halo=False, models=("gcn", "sage")
    ),
    Contender("partpar 2 x 1, recompute", "partpar", 2, 1, tuned=True, recompute=True),
)


def prepare(args: argparse.Namespace, parts: tuple[int, ...] = (1, 2, 4)) -> tuple[Path, dict[str, Any]]:
    r"""Generates the graph, cuts it and draws first weights; kept in a folder for the next time."""
    sizes = (args.nodes, args.edges, args.features, args.hidden, args.communities, args.mixing, *parts)
    folder = args.folder / f"partpar_full_graph_{'_'.join(map(str, sizes))}"

    def make() -> dict[str, Any]:
        # Loops and duplicates are dropped: some more are drawn, and the rest is told.
        data = planted(
            args.nodes, CLASSES, args.features, 1.14 * args.edges / args.nodes, args.mixing,
            num_communities=args.communities,
        )  # fmt: skip
        edges = data.edge_index.flip(0).contiguous()  # sorted by destination, as PyG likes it
        tensors = {"x": data.x, "y": data.y, "train_mask": data.train_mask, "edge_index": edges}
        save_file(tensors, folder / "graph.safetensors")
        for model in ("gcn", "sage", "gat"):
            torch.manual_seed(0)
            name, arguments = model_arguments(model, args.features, args.hidden, CLASSES)
            save_file(getattr(pyg_nn, name)(**arguments).state_dict(), folder / f"{model}.safetensors")
        degrees = edges[1].bincount(minlength=args.nodes)
        return {
            "nodes": args.nodes, "edges": edges.size(1), "features": args.features, "classes": CLASSES,
            "largest_degree": int(degrees.max()), "mixing": args.mixing,
            "cut": cut(GraphData.from_pyg_data(data), folder, parts),
        }  # fmt: skip

    return folder, kept(folder, make)


def run(
    contender: Contender, model: str, folder: Path, args: argparse.Namespace, **more: Any
) -> list[dict[str, Any]]:
    r"""Runs one contender in fresh processes; returns each rank's result."""
    slow = contender.name == "PyG edge_index"
    case = {
        "who": contender.who, "threads": contender.threads, "edges": contender.edges, "tuned": contender.tuned,
        "keep_halo": contender.keep_halo, "recompute": contender.recompute, "model": model, "classes": CLASSES,
        "hidden": args.hidden, "folder": str(folder), "warm": 1 if slow else 3,
        "epochs": max(2, args.epochs // 3) if slow else args.epochs, **more,
    }  # fmt: skip
    return launch("contenders.py", case, contender.ranks, contender.threads)


def kernels(args: argparse.Namespace) -> dict[str, float]:
    r"""The aggregation kernels against the bound of memory, by ``aggregate.py``."""
    sizes = [
        "--destinations",
        str(args.nodes),
        "--sources",
        str(args.nodes * 5 // 4),
        "--edges",
        str(args.edges),
    ]
    few = ["--pyg-edges", str(args.edges // 40), "--rounds", str(args.kernel_rounds)]
    command = [sys.executable, str(HERE / "aggregate.py"), *sizes, *few]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {
        f"{name}_{threads}": told[f"{name}_{threads}"]
        for name in ("sum_bound_share", "weighted_bound_share", "max_vs_sum")
        for threads in ("1_thread", "2_threads")
    }


HEADER = ("contender", "epoch s", "x first", "visible %", "hidden %", "sent MB", "peak MB", "dense s")


def table_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    r"""A line for each contender, cells as in :data:`HEADER`."""
    reference = next(iter(results.values()))["seconds"]

    def cell(row: dict[str, Any], name: str, scale: float, digits: int = 1) -> str:
        return f"{row[name] * scale:,.{digits}f}" if name in row else ""

    return [
        [
            name, f"{row['seconds']:.3f}", f"{row['seconds'] / reference:.3f}", cell(row, "visible", 100),
            cell(row, "hidden", 100), cell(row, "bytes_sent", 1e-6), cell(row, "peak", 1e-6, 0), cell(row, "dense", 1, 3),
        ]
        for name, row in results.items()
    ]  # fmt: skip


def rst(tables: dict[str, list[list[str]]], facts: dict[str, Any], held: list[Claim]) -> str:
    r"""The page of the documentation."""
    cut = ", ".join(
        f"{parts} parts {c['edge_cut']:.1%} of the edges"
        for parts, c in facts["cut"].items()
        if int(parts) > 1
    )
    lines = [
        "Training on the full graph", "==========================", "",
        f"Written by ``benchmarks/full_graph.py`` on {os.cpu_count()} cores, torch {torch.__version__}. The graph: {facts['nodes']:,} nodes,",
        f"{facts['edges']:,} edges, {facts['features']} features, largest degree {facts['largest_degree']:,}; METIS cuts into {cut}.",
        "*n x t* is n ranks of t threads. *Visible* is the share of the time a rank is blocked in exchanges, *hidden* that in",
        "which rows are on their way while it works; *sent* is per epoch, by all ranks; *peak* is the largest rank's memory",
        "above what torch and PyG take when imported; *dense* the time of the linear maps alone. *Features sent* exchanges",
        "input rows in each epoch, instead of keeping what of the first layer cannot change.", "",
    ]  # fmt: skip
    lines += [f"- {claim.text}: {'yes' if claim.holds else 'no'}, {claim.found:.3f}." for claim in held]
    for model, rows in tables.items():
        lines += ["", *list_table(model, [HEADER, *rows])]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    r"""The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--edges", type=int, default=4_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--communities", type=int, default=128)
    parser.add_argument("--mixing", type=float, default=0.03, help="share of edges that ignore communities")
    parser.add_argument("--models", nargs="+", default=["gcn", "sage", "gat"], choices=["gcn", "sage", "gat"])
    parser.add_argument("--only", help="only contenders with this in their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=6, help="timed epochs of each round; a third for PyG edge_index"
    )
    parser.add_argument("--kernel-rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the cut graph is kept"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--rst", type=Path, help="write the page of the documentation")
    return parser.parse_args()


def main() -> None:
    r"""Runs the benchmark."""
    args = parse()
    console = Console(stderr=True, width=130)
    folder, facts = prepare(args)
    console.print(facts)
    cases = [
        (model, contender) for model in args.models for contender in CONTENDERS
        if model in contender.models and (not args.only or args.only in contender.name)
    ]  # fmt: skip
    runs: dict[str, dict[str, list[Any]]] = {model: {} for model in args.models}
    for number in range(args.rounds):
        for model, contender in track(cases, f"round {number + 1} of {args.rounds}", console=console):
            runs[model].setdefault(contender.name, []).append(run(contender, model, folder, args))
    results = {model: {name: summarise(rounds) for name, rounds in of.items()} for model, of in runs.items()}
    differences = {model: agree(of, model) for model, of in results.items()}
    told = ratios(results) | (kernels(args) if args.kernel_rounds else {})
    held = claims(told)

    tables = {model: table_rows(of) for model, of in results.items()}
    for model, rows in tables.items():
        table = Table(*HEADER, title=f"{model}, losses agree to {differences[model]:.1e}")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for claim in held:
        console.print(
            f"{'PASS' if claim.holds else 'FAIL'}  {claim.text}: {claim.found:.3f}", highlight=False
        )
    if args.rst:
        args.rst.write_text(rst(tables, facts, held))
    whole = told | {"graph": facts, "largest_loss_difference": differences, "cases": results}
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
