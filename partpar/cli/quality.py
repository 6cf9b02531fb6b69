r"""The quality report of a partition as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from partpar.errors import PartparError
from partpar.partition import Manifest


class PlotError(PartparError, RuntimeError):
    r"""A picture was asked for that cannot be drawn."""


def print_report(
    console: Console, folder: Path, manifest: Manifest, plot: Path | None, quiet: bool = False
) -> None:
    r"""Prints a partition's report as tables, and draws it if asked.

    Args:
        console: Where to print.
        folder: Of the partition, for the heading.
        manifest: Its manifest.
        plot: Picture to write, by its suffix in any format of matplotlib; :obj:`None` draws nothing.
        quiet: Do not print.
    """
    if not quiet:
        console.print(whole_table(folder, manifest))
        console.print(parts_table(manifest))
    if plot is not None:
        draw(manifest, plot)
        if not quiet:
            console.print(f"drawn to {plot}", highlight=False, soft_wrap=True)


def record_of(folder: Path, manifest: Manifest) -> dict[str, Any]:
    r"""A partition's report, and what it is the report of, as plain values."""
    known = {name: getattr(manifest, name) for name in ("run_id", "algorithm", "num_parts", "arguments")}
    return {"folder": str(folder), **known, "report": manifest.report}


def check_plot(path: Path | None) -> None:
    r"""Refuses a picture that could not be drawn, before work is done for it.

    Raises:
        PlotError: If matplotlib is not installed or does not know the format.
    """
    if path is None:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    known = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise PlotError(f"{path}: expected the name of a picture such as cut.png, found another; {', '.join(known)} are known")


def whole_table(folder: Path, manifest: Manifest) -> Table:
    r"""The report's figures for the partition as a whole."""
    report = manifest.report
    table = Table("what", "value", title=f"{folder}: {manifest.num_parts} part(s) by {manifest.algorithm}")
    rows = {
        "nodes": f"{report['num_nodes']:,}",
        "edges": f"{report['num_edges']:,}",
        "edge cut": f"{report['edge_cut']:.2%}",
        "communication volume": f"{report['communication_volume']:,} rows an exchange",
        "halo share": f"{report['halo_share']:.2%} of the rows held",
        "replication factor": f"{report['replication_factor']:.3f}",
    }
    for node_type, nodes in report["nodes"].items():
        of_type = "" if len(report["nodes"]) == 1 else f" of {node_type}"
        rows[f"exchange{of_type}, one column"] = size_text(nodes["bytes_per_exchange_and_column"])
        if "bytes_per_exchange_of_x" in nodes:
            rows[f"exchange{of_type}, features x"] = size_text(nodes["bytes_per_exchange_of_x"])
    rows |= {f"largest / mean, {name}": f"{value:.3f}" for name, value in report["balance"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def parts_table(manifest: Manifest) -> Table:
    r"""What each part holds."""
    columns = per_part(manifest.report)
    table = Table("part", *columns)
    for part in range(manifest.num_parts):
        table.add_row(str(part), *(f"{column[part]:,.0f}" for column in columns.values()))
    return table


def per_part(report: dict[str, Any]) -> dict[str, np.ndarray]:
    r"""For each part: nodes, halo, edges, cut edges and every constraint, ``[num_parts]`` each."""
    nodes, edges = report["nodes"].values(), report["edges"].values()
    num_parts = len(next(iter(nodes))["owned"])
    columns = {
        "nodes": sum((np.array(n["owned"]) for n in nodes), np.zeros(num_parts)),
        "halo": sum((np.array(n["halo"]) for n in nodes), np.zeros(num_parts)),
        "edges": sum((np.array(e["edges"]) for e in edges), np.zeros(num_parts)),
        "cut edges": sum((np.array(e["cut_edges"]) for e in edges), np.zeros(num_parts)),
    }
    return columns | {
        name: np.array(sums) for name, sums in report["constraints"].items() if not name.startswith("#")
    }


def draw(manifest: Manifest, path: Path) -> None:
    r"""Draws balance bars and the part-to-part traffic matrix.

    Args:
        manifest: Of the partition.
        path: Picture to write; its suffix names the format.

    Raises:
        PlotError: If matplotlib is not installed or does not know the format.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    columns = {name: values for name, values in per_part(manifest.report).items() if values.sum() > 0}
    traffic = sum(np.array(nodes["traffic"]) for nodes in manifest.report["nodes"].values())
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    bars, matrix = figure.subplots(1, 2)

    width = 0.8 / max(1, len(columns))
    parts = np.arange(manifest.num_parts)
    for place, (name, values) in enumerate(columns.items()):
        bars.bar(parts + (place - (len(columns) - 1) / 2) * width, values / values.mean(), width, label=name)
    bars.axhline(1.0, color="black", linewidth=0.8)
    bars.set(xlabel="part", ylabel="relative to the mean part", title="balance")
    bars.xaxis.get_major_locator().set_params(integer=True)
    bars.legend(ncols=3, fontsize="small")

    image = matrix.imshow(traffic, cmap="viridis")
    figure.colorbar(image, ax=matrix, label="rows an exchange")
    matrix.set(xlabel="to part", ylabel="from part", title="traffic")
    for axis in (matrix.xaxis, matrix.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.suptitle(
        f"{manifest.algorithm}, {manifest.num_parts} part(s), edge cut {manifest.report['edge_cut']:.2%}"
    )
    figure.savefig(path, dpi=150)


def size_text(count: int) -> str:
    r"""A number of bytes, for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
