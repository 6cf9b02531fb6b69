r"""The cost of training on a partition, predicted for the command line."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from partpar.partition import Manifest
from partpar.training.cost import CostError, Network, Rates, Training, parts_of, predict


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    r"""Declares the options of a prediction."""
    group = parser.add_argument_group("prediction of an epoch on the full graph")
    group.add_argument("--predict", action="store_true", help="print what an epoch will take")
    group.add_argument("--model", choices=("gcn", "sage"), default="gcn", help="default gcn")
    group.add_argument("--layers", type=int, default=3, help="default 3")
    group.add_argument("--hidden", type=int, default=128, help="width of hidden rows; default 128")
    group.add_argument("--classes", type=int, default=32, help="width of output rows; default 32")
    group.add_argument(
        "--features", type=int, help="width of input rows; default that of the graph's x, or 128"
    )
    group.add_argument(
        "--gbit",
        type=float,
        default=10.0,
        help="bandwidth of each machine in each direction, Gbit/s; default 10",
    )
    group.add_argument(
        "--latency", type=float, default=50e-6, help="seconds until a message arrives; default 50e-6"
    )
    group.add_argument(
        "--machines", type=int, help="machines that the parts are spread over; default one for each"
    )
    group.add_argument(
        "--rates", type=Path, metavar="JSON", help="rates of your machine, by benchmarks/network.py"
    )


def cost_of(manifest: Manifest, args: argparse.Namespace) -> tuple[Table, dict[str, Any]]:
    r"""What an epoch on a partition will take, as a table and as plain values.

    Raises:
        CostError: If the numbers given, or the graph, are none to predict from.
    """
    parts = parts_of(manifest.report)
    machines = len(parts) if args.machines is None else args.machines
    if not 1 <= machines <= len(parts):
        raise CostError(f"--machines: expected 1 to {len(parts)}, the number of parts, found {machines}")
    if args.gbit <= 0 or args.latency < 0:
        raise CostError(
            f"expected --gbit above 0 and --latency of at least 0, found {args.gbit} and {args.latency}"
        )
    features = _features(manifest) if args.features is None else args.features
    training = Training(args.model, features, args.hidden, args.classes, args.layers)
    # Ranks of one machine copy; of several, they share its interface.
    network = None if machines == 1 else Network(args.gbit, args.latency, -(-len(parts) // machines))
    found = predict(parts, training, network, Rates() if args.rates is None else Rates.read(args.rates))

    where = "one machine" if network is None else f"{machines} machines, {args.gbit:g} Gbit/s"
    table = Table(
        "an epoch", "predicted", title=f"{args.layers}-layer {args.model}, hidden {args.hidden}, on {where}"
    )
    table.add_row("time", f"{found.seconds:.3g} s")
    table.add_row("rows on their way", f"{found.exchange:.3g} s")
    table.add_row("waiting for rows", f"{found.visible:.3g} s")
    table.add_row("sent by all ranks", f"{found.bytes_sent / 1e6:,.1f} MB")
    table.add_row("peak memory of a rank", f"{found.memory / 1e6:,.0f} MB")
    return table, {"training": asdict(training), "machines": machines, **asdict(found)}


def _features(manifest: Manifest) -> int:
    r"""Columns of the nodes' ``x``; 128 if they have none."""
    shapes = [shape for name, (_, shape) in manifest.shares[0].tensors.items() if name.endswith("/attr/x")]
    return next((shape[1] for shape in shapes if len(shape) == 2), 128)
