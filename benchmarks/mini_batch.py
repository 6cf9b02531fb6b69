r"""Neighbour-sampled training: partpar on two workers of one thread, against one process of two threads, and PyG.

.. code-block:: bash

    python benchmarks/mini_batch.py --json mini_batch.json --rst docs/mini_batch_speed.rst

A generated graph with communities and heavy-tailed degrees is cut once. An epoch goes through all seeds: sampling, the
rows of what was found, and a step of GraphSAGE for each batch; or the first two alone; or the first alone. Its time is
the median over epochs, from when all workers begin to when all are through. All stands beside a calibration, a matrix
product and a gather of rows, timed in the same processes before and after. Peak memory is VmHWM without the pages of mapped
shares, which are told apart: they are the page cache's, and processes of one machine share them. Seconds to the first batch count from the start of the process. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support.contest import list_table
from support.launch import launch
from torch_geometric.loader import NeighborLoader
from torch_geometric.typing import WITH_PYG_LIB, WITH_TORCH_SPARSE

from partpar import GraphData
from partpar.datasets import planted

CLASSES = 32
TARGETS = {
    "seeds_per_s_training": (50_000, "at least", "seeds a second with training, both workers"),
    "seeds_per_s_sampling": (100_000, "at least", "seeds a second for sampling and features alone"),
    "two_workers_speed_vs_one_process": (0.8, "at least", "speed of two workers of one thread over one of two threads"),
    "peak_mib_per_worker": (700, "at most", "MiB of memory of a worker at its peak, mapped shares apart"),
    "first_batch_s": (6.0, "at most", "seconds from the start of a process to its first batch"),
}


def graph_of(args: argparse.Namespace) -> Any:
    r"""The graph, the same for all; loops and duplicates are dropped, so some more edges are drawn."""
    data = planted(
        args.nodes, CLASSES, args.features, 1.14 * args.edges / args.nodes, args.mixing, num_communities=args.communities
    )
    data.train_mask = torch.zeros(args.nodes, dtype=torch.bool)
    data.train_mask[torch.randperm(args.nodes, generator=torch.Generator().manual_seed(0))[: args.seeds]] = True
    return data


def prepare(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    r"""Generates the graph and cuts it, balancing nodes and seeds; kept in a folder for the next time."""
    parts = sorted({1, 2, *args.table})
    sizes = (args.nodes, args.edges, args.features, args.seeds, args.communities, args.mixing)
    folder = args.folder / f"partpar_mini_batch_{'_'.join(map(str, sizes))}"
    missing = [n for n in parts if not (folder / f"metis_{n}" / "manifest.json").exists()]
    if missing:
        graph = GraphData.from_pyg_data(graph_of(args))
        for count in missing:
            graph.partition_graph(folder, count, overwrite=True)
    reports = {n: json.loads((folder / f"metis_{n}" / "manifest.json").read_text()) for n in parts}
    return folder, {
        "nodes": args.nodes,
        "edges": reports[1]["edge_types"][0][1][-1],
        "cut": {n: report["report"]["edge_cut"] for n, report in reports.items()},
    }


def run(args: argparse.Namespace, folder: Path, ranks: int, threads: int, **more: Any) -> list[dict[str, Any]]:
    r"""Runs one case in fresh processes; returns each rank's measures."""
    case = {
        "root": str(folder), "fanouts": args.fanouts, "batch_size": args.batch_size, "hidden": args.hidden, "classes": CLASSES,
        "threads": threads, "concurrency": args.concurrency, "epochs": args.epochs, "warm": 2, "started": time.time(),
        "measures": ["training", "features", "sampling"],
    }  # fmt: skip
    return launch("mini_batch_worker.py", case | more, ranks, threads)


def speed(ranks: list[dict[str, Any]], measure: str) -> float:
    r"""Seeds a second, of all ranks together, at the median epoch."""
    seconds = [max(times) for times in zip(*(rank[measure] for rank in ranks), strict=True)]
    return sum(rank["seeds"] for rank in ranks) / statistics.median(seconds)


def pyg(args: argparse.Namespace) -> float | None:
    r"""Seeds a second of PyG's own loader in one process, if something that it samples by is installed."""
    if not (WITH_PYG_LIB or WITH_TORCH_SPARSE):
        return None
    torch.set_num_threads(2)
    data = graph_of(args)
    loader = NeighborLoader(data, args.fanouts, data.train_mask, batch_size=args.batch_size, shuffle=True)
    seconds = []
    for _ in range(args.epochs + 2):
        start = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - start)
    return args.seeds / statistics.median(seconds[2:])


def epochs_by_batch_size(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    r"""Seconds per epoch of training for numbers of parts and sizes of batches."""
    table: dict[str, dict[str, float]] = {}
    for parts in args.table:
        for batch_size in args.batch_sizes:
            ranks = run(args, folder, parts, 1, batch_size=batch_size, epochs=3, warm=1, measures=["training"])
            seconds = [max(times) for times in zip(*(rank["training"] for rank in ranks), strict=True)]
            table.setdefault(str(parts), {})[str(batch_size)] = statistics.median(seconds)
    return table


def rst(told: dict[str, Any], args: argparse.Namespace) -> str:
    r"""The page of the documentation."""
    graph, table = told["graph"], told["seconds_per_epoch"]
    cut = ", ".join(f"{parts} parts {share:.1%} of the edges" for parts, share in graph["cut"].items() if parts > 1)
    both = [f"{name.replace('_', ' ')} {one:.0f} and {other:.0f}" for name, one, other in calibrations(told)]
    lines = [
        "Training on sampled batches", "===========================", "",
        f"Written by ``benchmarks/mini_batch.py`` on {told['cores']} cores, torch {told['torch']}. The graph: {graph['nodes']:,} nodes,",
        f"{graph['edges']:,} edges, {args.features} features; METIS cuts into {cut}. {args.seeds:,} seeds, fan-outs",
        f"{', '.join(map(str, args.fanouts))}, GraphSAGE with {args.hidden} hidden columns, batches of {args.batch_size:,}. Medians of {args.epochs} epochs after two.",
        f"How fast the machine was meanwhile, before and after: {', '.join(both)}.", "",
    ]  # fmt: skip
    for name, (bound, how, text) in TARGETS.items():
        found = f"{told[name]:,.0f}" if bound >= 100 else f"{told[name]:.2f}"
        lines.append(f"- {text}: {how} {bound:,}: {'yes' if holds(told, name) else 'no'}, {found}.")
    names = {"training": "with training", "sampling": "sampling and features"}
    rows = [
        [text, f"{told[f'seeds_per_s_{name}']:,.0f}", f"{told[f'one_process_seeds_per_s_{name}']:,.0f}"]
        for name, text in names.items()
    ]
    lines += ["", *list_table("Seeds a second", [("what", "two workers x 1 thread", "one process x 2 threads"), *rows])]
    if table:
        header = ("parts", *(f"batches of {size:,}" for size in args.batch_sizes))
        rows = [[parts, *(f"{row[str(size)]:.3f}" for size in args.batch_sizes)] for parts, row in table.items()]
        lines += ["", "Each part has one worker of one thread.", ""]
        lines += list_table("Seconds an epoch, with training", [header, *rows])
    return "\n".join(lines) + "\n"


def calibrations(told: dict[str, Any]) -> list[tuple[str, float, float]]:
    r"""Each figure of the machine's speed, before and after."""
    before, after = told["calibration"]
    return [(name, before[name], after[name]) for name in before]


def holds(told: dict[str, Any], name: str) -> bool:
    r"""Whether a target is met."""
    bound, how, _ = TARGETS[name]
    return bool(told[name] >= bound if how == "at least" else told[name] <= bound)


def parse() -> argparse.Namespace:
    r"""The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--edges", type=int, default=4_000_000)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--communities", type=int, default=128)
    parser.add_argument("--mixing", type=float, default=0.03, help="share of edges that ignore communities")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10, 5])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10, help="timed epochs, after two to warm up")
    parser.add_argument("--concurrency", type=int, default=1, help="threads of a worker that make batches")
    parser.add_argument("--table", type=int, nargs="*", default=[1, 2, 4], help="numbers of parts of the table")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 4096, 8192], help="of the table")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the cut graph is kept")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--rst", type=Path, help="write the page of the documentation")
    return parser.parse_args()


def main() -> None:
    r"""Runs the benchmark."""
    args = parse()
    console = Console(stderr=True, width=120)
    folder, facts = prepare(args)
    run(args, folder, 2, 1, epochs=1, warm=0)  # compiles, so that the start is that of every later run
    two, one = run(args, folder, 2, 1), run(args, folder, 1, 2)
    table = epochs_by_batch_size(args, folder) if args.table else {}
    told: dict[str, Any] = {
        "seeds_per_s_training": speed(two, "training"),
        "seeds_per_s_sampling": speed(two, "features"),
        "seeds_per_s_sampling_without_features": speed(two, "sampling"),
        "two_workers_speed_vs_one_process": speed(two, "training") / speed(one, "training"),
        "one_process_seeds_per_s_training": speed(one, "training"),
        "one_process_seeds_per_s_sampling": speed(one, "features"),
        "peak_mib_per_worker": max(rank["peak_mib"] - rank["mapped_mib"] for rank in two),
        "mapped_mib_per_worker": max(rank["mapped_mib"] for rank in two),
        "first_batch_s": max(rank["first_batch_s"] for rank in two),
        "megabytes_per_epoch": sum(rank["training_bytes"] for rank in two) / 1e6,
        "pyg_seeds_per_s_sampling": pyg(args),
        "calibration": two[0]["calibration"],
        "calibration_one_process": one[0]["calibration"],
        "cache": two[0]["cache"],
        "seconds_per_epoch": table,
        "graph": facts,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    for name, (bound, how, _) in TARGETS.items():
        verdict = "PASS" if holds(told, name) else "FAIL"
        console.print(f"{verdict}  {name}: {told[name]:,.2f}, {how} {bound:,}", highlight=False)
    if table:
        shown = Table("parts", *(f"batch {size}" for size in args.batch_sizes), title="seconds per epoch")
        for parts, row in table.items():
            shown.add_row(parts, *(f"{row[str(size)]:.3f}" for size in args.batch_sizes))
        console.print(shown)
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    if args.rst:
        args.rst.write_text(rst(told, args))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
