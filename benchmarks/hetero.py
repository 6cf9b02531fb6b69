r"""An epoch of RGCN on a typed graph: PyG in one process, partpar on 2 workers.

.. code-block:: bash

    python benchmarks/hetero.py --json hetero.json --rst docs/typed_speed.rst

A generated graph of 4 node types, 7 relations and a million edges is cut once. Then the contenders take turns, round
after round, each in fresh processes; an epoch is forward pass, loss, backward pass and Adam's step over the whole
graph, its time the median over all rounds, of the slowest rank. Peak memory is that of the largest rank, above what a
process holds once torch and PyG are imported. All start from the same weights and must agree on the first losses. The
last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.contest import agree, cut, kept, list_table, summarise
from support.launch import launch
from support.targets import Claim
from torch_geometric.data import HeteroData

from partpar import GraphData

CLASSES = 16
RELATIONS = {  # and each but the second the other way round; edges in thousandths of the whole
    ("author", "writes", "paper"): 150,
    ("paper", "cites", "paper"): 200,
    ("paper", "has", "term"): 200,
    ("paper", "in", "venue"): 50,
}
NODES = {"paper": 500, "author": 300, "term": 190, "venue": 10}  # thousandths of the whole


@dataclass(frozen=True)
class Contender:
    r"""Who trains, on how many ranks with how many threads each, and how; :obj:`blocks` is what the environment or the
    script does about large blocks of memory: nothing, ``"huge pages"`` or ``"kept"``, which ``partpar.init`` does unasked."""

    name: str
    who: str
    ranks: int = 1
    threads: int = 2
    keep_halo: bool = True
    blocks: str = ""


THEIRS, OURS = "PyG RGCNConv 1 x 2", "partpar 2 x 1"
CONTENDERS = (
    Contender(THEIRS, "pyg"),
    Contender("PyG RGCNConv 1 x 2, huge pages", "pyg", blocks="huge pages"),
    Contender("PyG RGCNConv 1 x 2, blocks kept", "pyg", blocks="kept"),
    Contender("partpar 1 x 2", "partpar"),
    Contender(OURS, "partpar", ranks=2, threads=1),
    Contender("partpar 2 x 1, huge pages", "partpar", ranks=2, threads=1, blocks="huge pages"),
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
    sizes = (args.nodes, args.edges, args.features, args.communities, args.mixing)
    folder = args.folder / f"partpar_typed_{'_'.join(map(str, sizes))}"

    def make() -> dict[str, Any]:
        data = typed_graph(args)
        graph = GraphData.from_pyg_data(data)
        graph.save(folder / "graph")
        return {
            "nodes": {t: data[t].num_nodes for t in data.node_types},
            "edges": sum(data[e].num_edges for e in data.edge_types),
            "features": args.features,
            "edge_types": data.edge_types,
            "cut": cut(graph, folder, (1, 2), ["#nodes:*", "train_mask:*"]),
        }

    return folder, kept(folder, make)


def claims(results: dict[str, dict[str, Any]]) -> dict[str, Claim]:
    r"""What is to hold of the ratios, where both contenders ran."""
    if THEIRS not in results or OURS not in results:
        return {}
    speedup = results[THEIRS]["seconds"] / results[OURS]["seconds"]
    memory = results[OURS]["peak"] / results[THEIRS]["peak"]
    return {
        "speedup": Claim("2 workers x 1 thread at least 4 times as fast as PyG in one process x 2", speedup, speedup >= 4),
        "memory_ratio": Claim("At most 0.6 of its memory per worker", memory, memory <= 0.6),
    }


HEADER = ("contender", "epoch s", "x first", "sent MB", "peak MB")


def table_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    r"""A line for each contender, cells as in :data:`HEADER`."""
    first = next(iter(results.values()))["seconds"]
    return [
        [
            name, f"{row['seconds']:.3f}", f"{row['seconds'] / first:.3f}",
            f"{row['bytes_sent'] / 1e6:.1f}" if "bytes_sent" in row else "", f"{row['peak'] / 1e6:,.0f}",
        ]
        for name, row in results.items()
    ]  # fmt: skip


def rst(rows: list[list[str]], facts: dict[str, Any], held: dict[str, Claim]) -> str:
    r"""The page of the documentation."""
    sizes = ", ".join(f"{count:,} {name}s" for name, count in facts["nodes"].items())
    two = facts["cut"]["2"]
    text = (
        f"Written by ``benchmarks/hetero.py`` on {os.cpu_count()} cores, torch {torch.__version__}. The graph: {sizes}; "
        f"{facts['edges']:,} edges of {len(facts['edge_types'])} relations, {facts['features']} features. METIS, with every type "
        f"balanced, cuts {two['edge_cut']:.1%} of the edges into 2 parts, of which the larger is {max(two['balance'].values()):.2f} of "
        "the mean in the worst type. An epoch is forward pass, loss, backward pass and Adam's step of an RGCN with two layers. "
        "*n x t* is n workers of t threads; *sent* is per epoch, by all workers; *peak* is the largest worker's memory above "
        "what torch and PyG take when imported. *Features sent* exchanges input rows in each epoch, instead of once. All start as "
        "``torchrun`` starts them, without settings; *huge pages* has ``THP_MEM_ALLOC_ENABLE=1`` in the environment, and *blocks "
        "kept* tells glibc to keep large blocks, as ``partpar.init`` does by itself."
    )
    lines = ["Training on a typed graph", "=========================", "", *textwrap.wrap(text, 120), ""]
    lines += [f"- {c.text}: {'yes' if c.holds else 'no'}, {c.found:.3f}." for c in held.values()]
    return "\n".join([*lines, "", *list_table("", [HEADER, *rows])]) + "\n"


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
    parser.add_argument("--rst", type=Path, help="write the page of the documentation")
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
                "tuned": contender.blocks == "huge pages", "epochs": args.epochs, "edge_types": facts["edge_types"],
            }  # fmt: skip
            runs[contender.name].append(launch("hetero_worker.py", case, contender.ranks, contender.threads))
    results = {name: summarise(rounds) for name, rounds in runs.items()}
    difference, held = agree(results, "rgcn"), claims(results)
    rows = table_rows(results)
    table = Table(*HEADER, title=f"losses agree to {difference:.1e}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for claim in held.values():
        console.print(f"{'PASS' if claim.holds else 'FAIL'}  {claim.text}: {claim.found:.3f}", highlight=False)
    if args.rst:
        args.rst.write_text(rst(rows, facts, held))
    told = {name: claim.found for name, claim in held.items()}
    whole = told | {"graph": facts, "largest_loss_difference": difference, "cases": results}
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
