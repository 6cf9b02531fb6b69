r"""``partpar partition``: cut a graph into shares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from partpar import GraphData, datasets
from partpar.cli.report import print_report
from partpar.errors import PartitionError
from partpar.partition import read_manifest

HELP = "Cut a graph into shares, one for each worker, and report the quality of the cut."
EXAMPLE = "partpar partition partitions/cora --npz cora.npz --num-parts 4 --balance train_mask '#in_edges'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument(
        "root", type=Path, help="folder of this graph's partitions; shares go to ROOT/ALGORITHM_PARTS"
    )
    graph = parser.add_mutually_exclusive_group(required=True)
    graph.add_argument("--dataset", help="planted, karate, Cora, CiteSeer, PubMed or ogbn-...")
    graph.add_argument("--npz", type=Path, metavar="FILE", help="arrays in one .npz file")
    graph.add_argument("--pt", type=Path, metavar="FILE", help="a PyG graph written by torch.save")
    graph.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="memory-mapped .npy files, one for each attribute"
    )
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
        "--edge-weight", metavar="NAME", help="edge attribute that says what cutting an edge costs"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the algorithm and a generated graph (default: 0)"
    )
    parser.add_argument(
        "--split", type=int, default=0, help="split of an .npz file that has several (default: 0)"
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


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Cuts the graph, writes the shares and prints the report."""
    options = dict(_option(text) for text in args.option)
    weights = args.balance[0] if args.balance and len(args.balance) == 1 else args.balance
    folder = read_graph(args).partition_graph(
        args.root,
        args.num_parts,
        node_weight=weights,
        edge_weight=args.edge_weight,
        algorithm=args.algorithm,
        partition_kwargs={"seed": args.seed, **options},
        overwrite=args.overwrite,
    )
    print_report(console, folder, read_manifest(folder), args.plot)
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
