r"""An epoch of RGCN on a typed graph: PyG in one process, partpar on 2 workers.

.. code-block:: bash

    python benchmarks/hetero.py --json hetero.json

A generated graph of 4 node types, 7 relations and a million edges is cut once. Then the contenders take turns, round
after round, each in fresh processes; an epoch is forward pass, loss, backward pass and Adam's step over the whole
graph, its time the median over all rounds, of the slowest rank. Peak memory is that of the largest rank, above what a
process holds once torch and PyG are imported. All start from the same weights and must agree on the first losses. The
last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.launch import launch
from torch_geometric.data import HeteroData

from partpar import GraphData

CLASSES, TOLERANCE = 16, 1e-4
RELATIONS = {  # and each but the second the other way round; edges in thousandths of the whole
    ("author", "writes", "paper"): 150,
    ("paper", "cites", "paper"): 200,
    ("paper", "has", "term"): 200,
    ("paper", "in", "venue"): 50,
}
NODES = {"paper": 500, "author": 300, "term": 190, "venue": 10}  # thousandths of the whole


@dataclass(frozen=True)
class Contender:
    r"""Who trains, on how many ranks with how many threads each, and how."""

    name: str
    who: str
    ranks: int = 1
    threads: int = 2
    keep_halo: bool = True
    tuned: bool = True


THEIRS, OURS = "PyG RGCNConv 1 x 2", "partpar 2 x 1"
CONTENDERS = (
    Contender(THEIRS, "pyg", tuned=False),
    Contender("PyG RGCNConv 1 x 2, huge pages", "pyg"),
    Contender("partpar 1 x 2", "partpar"),
    Contender(OURS, "partpar", ranks=2, threads=1),
    Contender("partpar 2 x 1, features sent", "partpar", ranks=2, threads=1, keep_halo=False),
)


def typed_graph(args: argparse.Namespace) -> HeteroData:
    r"""Nodes of all types in communities; an edge joins two of one community, or with :obj:`mixing` any two."""
    draw = torch.Generator().manual_seed(0)
    data = HeteroData()
    home = {}
    for name, share in NODES.items():
        count = max(args.nodes * share // 1000, args.communities)
        home[name] = torch.arange(count) % args.communities
        data[name].x = torch.randn(count, args.features, generator=draw)
    data["paper"].y = home["paper"] % CLASSES
    data["paper"].train_mask = torch.rand(data["paper"].num_nodes, generator=draw) < 0.2
    data["paper"].x[:, :CLASSES] += torch.nn.functional.one_hot(data["paper"].y, CLASSES)
    for (source, name, destination), share in RELATIONS.items():
        count = args.edges * share // 1000
        start = torch.randint(data[source].num_nodes, (count,), generator=draw)
        size = data[destination].num_nodes
        end = torch.randint(size // args.communities, (count,), generator=draw) * args.communities
        end += home[source][start]
        free = torch.rand(count, generator=draw) < args.mixing
        end[free] = torch.randint(size, (int(free.sum()),), generator=draw)
        edges = torch.stack([start, end])
        edges = edges[:, edges[1].argsort(stable=True)]
        data[source, name, destination].edge_index = edges
        if source != destination:
            data[destination, f"rev_{name}", source].edge_index = edges.flip(0)[:, edges[0].argsort(stable=True)]
    return data


def prepare(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    r"""Generates the graph and cuts it; kept in a folder for the next time."""
    key = "_".join(map(str, (args.nodes, args.edges, args.features, args.communities, args.mixing)))
    folder = args.folder / f"partpar_hetero_{key}"
    facts = folder / "facts.json"
    if not facts.exists():
        data = typed_graph(args)
        graph = GraphData.from_pyg_data(data)
        graph.save(folder / "graph")
        told: dict[str, Any] = {
            "nodes": {t: data[t].num_nodes for t in data.node_types},
            "edges": sum(data[e].num_edges for e in data.edge_types),
            "edge_types": data.edge_types,
        }
        for parts in (1, 2):
            path = graph.partition_graph(folder, parts, ["#nodes:*", "train_mask:*"], overwrite=True)
            report = json.loads((path / "manifest.json").read_text())["report"]
            told[f"cut_{parts}"] = {key: report[key] for key in ("edge_cut", "halo_share", "balance")}
        facts.write_text(json.dumps(told))
    return folder, json.loads(facts.read_text())


def summarise(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    r"""The slowest rank's median time, the largest rank's peak, and the first losses."""
    seconds = [max(of_ranks) for ranks in rounds for of_ranks in zip(*(r["seconds"] for r in ranks), strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "peak": statistics.median(max(r["peak"] for r in ranks) for ranks in rounds),
        "losses": rounds[0][0]["losses"][:2],
        "bytes_sent": rounds[0][0].get("bytes_sent", 0.0),
    }


def parse() -> argparse.Namespace:
    r"""The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=120_000)
    parser.add_argument("--edges", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--communities", type=int, default=128)
    parser.add_argument("--mixing", type=float, default=0.05, help="share of edges that ignore communities")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each round")
    parser.add_argument("--only", help="only contenders with this in their names")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def main() -> None:
    r"""Runs the benchmark."""
    args = parse()
    console = Console(stderr=True, width=130)
    folder, facts = prepare(args)
    console.print(facts)
    chosen = [c for c in CONTENDERS if not args.only or args.only in c.name]
    runs: dict[str, list[Any]] = {c.name: [] for c in chosen}
    for number in range(args.rounds):
        for contender in track(chosen, f"round {number + 1} of {args.rounds}", console=console):
            case = asdict(contender) | {
                "folder": str(folder), "sizes": (args.features, args.hidden, CLASSES), "warm": 2, "model": "rgcn",
                "epochs": args.epochs, "edge_types": facts["edge_types"],
            }  # fmt: skip
            runs[contender.name].append(launch("hetero_worker.py", case, contender.ranks, contender.threads))
    results = {name: summarise(rounds) for name, rounds in runs.items()}
    one = next(iter(results.values()))["losses"]
    difference = max(
        abs(a - b) / abs(b) for r in results.values() for a, b in zip(r["losses"], one, strict=True)
    )
    if difference > TOLERANCE:
        raise SystemExit(f"contenders disagree on the first losses by {difference:.1e}: {results}")

    table = Table("contender", "epoch", "peak memory", "sent an epoch", title=f"losses agree to {difference:.1e}")
    for name, r in results.items():
        sent = f"{r['bytes_sent'] / 1e6:.1f} MB"
        table.add_row(name, f"{r['seconds'] * 1e3:.0f} ms", f"{r['peak'] / 2**20:.0f} MiB", sent)
    console.print(table)
    told: dict[str, Any] = {}
    if THEIRS in results and OURS in results:
        told = {
            "speedup": results[THEIRS]["seconds"] / results[OURS]["seconds"],
            "memory_ratio": results[OURS]["peak"] / results[THEIRS]["peak"],
        }
        for holds, text in (
            (told["speedup"] >= 4, f"at least 4 times as fast as PyG: {told['speedup']:.2f}"),
            (told["memory_ratio"] <= 0.6, f"at most 0.6 of its memory per worker: {told['memory_ratio']:.3f}"),
        ):
            console.print(f"{'PASS' if holds else 'FAIL'}  {text}", highlight=False)
    whole = told | {"graph": facts, "largest_loss_difference": difference, "cases": results}
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
