r"""``partpar partition``: cut a graph into shares."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from partpar import GraphData, datasets
from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.cli.progress import say_if_kept, shown_phases
from partpar.cli.quality import check_plot, print_report, record_of, size_text
from partpar.errors import PartitionError
from partpar.partition import read_manifest
from partpar.partition.forecast import forecast

EXAMPLE = "partpar partition partitions/cora --npz cora.npz --num-parts 4 --balance train_mask '#in_edges'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument(
        "root", type=Path, help="folder of this graph's partitions; shares go to ROOT/ALGORITHM_PARTS"
    )
    add_graph_arguments(parser)
    parser.add_argument("--num-parts", type=int, required=True, metavar="N", help="number of shares")
    parser.add_argument(
        "--algorithm", default="metis", help="metis (default), multi-constraint-metis, ldg or random"
    )
    parser.add_argument(
        "--balance",
        nargs="+",
        metavar="WEIGHT",
        help="what to balance: node attributes, #nodes or #in_edges (default: #nodes)",
    )
    parser.add_argument(
        "--balance-train", action="store_true", help="balance training nodes too: adds train_mask to --balance"
    )
    parser.add_argument(
        "--balance-edges", action="store_true", help="balance in-edges too: adds #in_edges to --balance"
    )
    parser.add_argument(
        "--edge-weight", metavar="NAME", help="edge attribute that says what cutting an edge costs"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the algorithm, such as passes=5; may be repeated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another partition that stands there"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw balance and traffic (needs matplotlib)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="cut nothing: print the memory that it will take and sizes of files"
    )
    add_json_argument(parser, "the report")


def add_graph_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    r"""Declares the options that name a graph."""
    graph = parser.add_mutually_exclusive_group(required=required)
    graph.add_argument("--dataset", help="planted, karate, Cora, CiteSeer, PubMed or ogbn-...")
    graph.add_argument("--npz", type=Path, metavar="FILE", help="arrays in one .npz file")
    graph.add_argument("--pt", type=Path, metavar="FILE", help="a PyG graph written by torch.save")
    graph.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="memory-mapped .npy files, one for each attribute"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the algorithm and a generated graph (default: 0)"
    )
    parser.add_argument(
        "--split", type=int, default=0, help="split of an .npz file that has several (default: 0)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Cuts the graph, writes the shares and prints the report."""
    options = dict(_option(text) for text in args.option)
    check_plot(args.plot)
    graph = read_graph(args)
    _warn_of_empty_parts(graph, args.num_parts)
    if args.dry_run:
        return _dry_run(graph, args, console)
    with shown_phases() as entered:
        folder = graph.partition_graph(
            args.root,
            args.num_parts,
            node_weight=_weights(graph, args),
            edge_weight=args.edge_weight,
            algorithm=args.algorithm,
            partition_kwargs={"seed": args.seed, **options},
            overwrite=args.overwrite,
        )
    say_if_kept(entered, folder)
    manifest = read_manifest(folder)
    print_report(console, folder, manifest, args.plot, quiet=not tables_wanted(args.json))
    write_json(args.json, [record_of(folder, manifest)])
    return 0


def _warn_of_empty_parts(graph: GraphData, num_parts: int) -> None:
    num_nodes = sum(map(graph.num_nodes, graph.node_types))
    if num_parts > num_nodes:
        empty = num_parts - num_nodes
        print(
            f"partpar: {num_parts} parts of {num_nodes} nodes: at least {empty} will be empty, and their workers idle; "
            f"expected --num-parts of at most {num_nodes}",
            file=sys.stderr,
        )


def _weights(graph: GraphData, args: argparse.Namespace) -> str | list[str] | None:
    r"""What to balance; nodes themselves, and what the short options add to them."""
    more = [f"train_mask{':*' if len(graph.node_types) > 1 else ''}"] if args.balance_train else []
    more += ["#in_edges"] if args.balance_edges else []
    if not more:
        return args.balance[0] if args.balance and len(args.balance) == 1 else args.balance
    return list(dict.fromkeys([*(args.balance or ["#nodes"]), *more]))


def _dry_run(graph: GraphData, args: argparse.Namespace, console: Console) -> int:
    found = forecast(graph, args.num_parts, args.algorithm)
    table = Table("what", "predicted", title=f"{args.num_parts} part(s) by {args.algorithm}; nothing was cut")
    table.add_row("memory of the loaded graph", size_text(found.graph))
    table.add_row("peak memory of the cut beside it, at most", size_text(found.memory))
    table.add_row("files, if no edge is cut", size_text(found.files))
    table.add_row("files, at most", size_text(found.files + found.halo))
    table.add_row("a share, about", size_text((found.files + found.halo // 2) // args.num_parts))
    if tables_wanted(args.json):
        console.print(table)
    write_json(args.json, [{"dry_run": asdict(found), "algorithm": args.algorithm, "num_parts": args.num_parts}])
    return 0


def read_graph(args: argparse.Namespace) -> GraphData:
    r"""The graph that the options name."""
    if args.folder is not None:
        return GraphData.open(args.folder)
    if args.npz is not None:
        return GraphData.from_pyg_data(datasets.from_npz(args.npz, args.split))
    if args.pt is not None:
        return GraphData.from_pyg_data(datasets.from_pt(args.pt))
    seeded = {"seed": args.seed} if args.dataset in datasets.GENERATED else {}
    return GraphData.from_pyg_data(datasets.load(args.dataset, **seeded))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise PartitionError(f"expected --option NAME=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a word, such as recursive=kway
