r"""``partpar convert``: partitions that others wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from partpar import GraphData
from partpar.cli.output import add_json_argument, tables_wanted, write_json
from partpar.cli.partition import add_graph_arguments, read_graph
from partpar.cli.progress import say_if_kept, shown_phases
from partpar.cli.quality import print_report, record_of
from partpar.errors import PartitionError
from partpar.partition import read_manifest
from partpar.partition.dgl_json import read_dgl_assignment
from partpar.partition.pyg_files import read_pyg_partition

EXAMPLE = "partpar convert pyg_partition partitions/cora --from pyg --npz cora.npz"
NOTE = """\
PyG's Partitioner keeps x, edge_attr and times. Labels, masks and all else come from the graph itself, if it is named.
Of DGL, the JSON file tells the parts of nodes; the graph itself must be named, and the mapping of node ids, which
partition_graph(..., return_mapping=True) returns.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options."""
    parser.add_argument("source", type=Path, help="the folder of PyG's META.json, or DGL's JSON file")
    parser.add_argument("root", type=Path, help="folder of this graph's partitions; shares go to ROOT/given_PARTS")
    parser.add_argument("--from", dest="kind", choices=("pyg", "dgl-json"), required=True, help="who wrote it")
    add_graph_arguments(parser, required=False)
    parser.add_argument("--mapping", type=Path, metavar="FILE", help="of DGL: raw node ids, .npy, .npz or .pt")
    parser.add_argument("--overwrite", action="store_true", help="replace another partition that stands there")
    add_json_argument(parser, "the report")
    parser.description = f"{parser.description}\n\n{NOTE}"


def run(args: argparse.Namespace, console: Console) -> int:
    r"""Reads the partition and writes the shares."""
    named = any(getattr(args, name) is not None for name in ("dataset", "npz", "pt", "folder"))
    own = read_graph(args) if named else None
    if args.kind == "pyg":
        graph, num_parts, assignment = read_pyg_partition(args.source)
        if own is not None:
            graph = _checked(own, graph)
    else:
        if own is None:
            raise PartitionError("--from dgl-json: expected the graph, by --npz, --pt, --dataset or --folder, found none")
        graph = own
        num_parts, assignment = read_dgl_assignment(args.source, args.mapping)
    with shown_phases() as entered:
        folder = graph.partition_graph(
            args.root, num_parts, algorithm="given", partition_kwargs={"assignment": assignment}, overwrite=args.overwrite
        )
    say_if_kept(entered, folder)
    manifest = read_manifest(folder)
    if tables_wanted(args.json):
        print_report(console, folder, manifest, None)
    write_json(args.json, [record_of(folder, manifest)])
    return 0


def _checked(own: GraphData, kept: GraphData) -> GraphData:
    r"""The user's own graph, if it is the one that was cut."""
    if set(own.edge_types) != set(kept.edge_types) or set(own.node_types) != set(kept.node_types):
        raise PartitionError(
            f"expected the graph that was cut, with types {kept.node_types} and {kept.edge_types}, found {own.node_types} and {own.edge_types}"
        )
    for edge_type in kept.edge_types:
        if not own.edge_index(edge_type).equal(kept.edge_index(edge_type)):
            raise PartitionError(f"expected the graph that was cut, found other edges of type {edge_type}; name the one that PyG was given")
    return own
