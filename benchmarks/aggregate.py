r"""How fast a share's in-edges are aggregated, against the copy bandwidth of the machine and against PyG.

.. code-block:: bash

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/aggregate.py --json aggregate.json

All candidates of one group take turns, round after round, so that what else the machine does meets them
alike; a figure is the median over rounds, and a ratio is taken between medians of one group. Peak memory is
that of a process of its own, above what it held before the first call. The last line printed is the JSON
object.

The bound of a sum is the time to move its bytes once without any reuse by the caches, every edge fetching its
row anew, at the bandwidth of a plain copy measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch_geometric.nn import GATConv
from torch_geometric.utils import scatter

from partpar.kernels import aggregate
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.linear import edge_dot, sum_into
from partpar.training.machine import forget_peak_memory, peak_memory, tune_allocator

Calls = dict[str, Callable[[], object]]
HEADS, WIDTH = 4, 32
COLUMNS = HEADS * WIDTH


def random_edges(num_dst: int, num_src: int, num_edges: int, skew: float) -> Tensor:
    r"""int64 ``[2, E]``, sorted by destination; degrees grow with :obj:`skew` (zero: uniform, no
    communities).
    """
    generator = torch.Generator().manual_seed(0)
    ends = [
        (torch.rand(num_edges, generator=generator).double() ** (1 + skew) * count).long()
        for count in (num_src, num_dst)
    ]
    src, dst = (
        torch.randperm(count, generator=generator)[end]
        for count, end in zip((num_src, num_dst), ends, strict=True)
    )
    dst, order = dst.sort(stable=True)
    return torch.stack([src[order], dst])


def backward_too(call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    r"""The call and the gradients of its inputs."""
    return lambda: torch.autograd.grad(call(), inputs, grad)


def medians(calls: Calls, rounds: int) -> dict[str, float]:
    r"""Milliseconds of each call; one round more than counted warms up and compiles."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def sums(adj: Adjacency, rounds: int) -> dict[str, float]:
    r"""Candidates for sum, weighted sum and extremes, of which the library uses the first named of each
    kind.
    """
    x = torch.randn(adj.num_src, COLUMNS, requires_grad=True)
    weight, varying = torch.rand(adj.num_edges), torch.rand(adj.num_edges, requires_grad=True)
    grad, base = torch.randn(adj.num_dst, COLUMNS), torch.zeros(adj.num_dst, COLUMNS)
    half, wide = x.detach().bfloat16(), x.detach().double()
    matrix, wide_matrix = adj.torch_csr(), adj.torch_csr(torch.float64)
    block = torch.randn(32 << 20)
    target = torch.empty_like(block)

    def ours(op: str) -> Callable[[], Tensor]:
        return lambda: getattr(aggregate, f"aggregate_{op}")(adj, x)

    def weighted(by: Tensor) -> Callable[[], Tensor]:
        return lambda: aggregate.aggregate_sum(adj, x, by)

    plain = x.detach()
    heads = plain.view(-1, HEADS, WIDTH)
    head_weight = weight.view(-1, 1).repeat(1, HEADS)
    calls: Calls = {
        "copy": lambda: target.copy_(block),
        "sum": ours("sum"),
        "sum f+b": backward_too(ours("sum"), [x], grad),
        "weighted": weighted(weight),
        "weighted f+b": backward_too(weighted(weight), [x], grad),
        "weighted, weights too, f+b": backward_too(weighted(varying), [x, varying], grad),
        "mean f+b": backward_too(ours("mean"), [x], grad),
        "max": lambda: aggregate.aggregate_max(adj, plain),
        "max f+b": backward_too(ours("max"), [x], grad),
        "sum, Numba in place": lambda: sum_into(adj, plain, None, base),
        "weighted, Numba in place": lambda: sum_into(adj, plain, weight.view(-1, 1), base),
        "weighted by head": lambda: aggregate.aggregate_sum(adj, heads, head_weight),
        "edge dot": lambda: edge_dot(adj, grad, plain),
        "sum, torch.sparse": lambda: matrix @ plain,
        "sum bfloat16": lambda: aggregate.aggregate_sum(adj, half),
        "sum float64": lambda: aggregate.aggregate_sum(adj, wide),
        "sum float64, torch.sparse": lambda: wide_matrix @ wide,
    }
    return medians(calls, rounds) | {"copied GB": 2 * block.numel() * 4 / 1e9}


def bound_shares(adj: Adjacency, taken: dict[str, float]) -> dict[str, float]:
    r"""What part of the bound the sums reach, and how many sums an extreme takes."""
    per_ms = taken["copied GB"] / taken["copy"]
    moved = (adj.num_edges * (COLUMNS * 4 + 4) + adj.num_dst * COLUMNS * 4) / 1e9
    return {
        "sum_bound_share": moved / per_ms / taken["sum"],
        "weighted_bound_share": (moved + adj.num_edges * 4 / 1e9) / per_ms / taken["weighted"],
        "max_vs_sum": taken["max f+b"] / taken["sum f+b"],
    }


class Attention(torch.nn.Module):
    r"""GATConv with our kernel in place of its messages."""

    def __init__(self, conv: GATConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, adj: Adjacency) -> Tensor:
        rows = self.conv.lin(x)
        # Both products with the attention vectors as one narrow matrix product: no temporaries as wide as the
        # rows.
        narrow = torch.cat(
            [torch.block_diag(*att[0].unsqueeze(-1)) for att in (self.conv.att_src, self.conv.att_dst)], 1
        )
        a_src, a_dst = (rows @ narrow).split(HEADS, 1)
        rows = rows.view(-1, HEADS, WIDTH)
        out = aggregate.aggregate_gat(adj, rows, a_src, a_dst[: adj.num_dst])
        return out.view(-1, COLUMNS) + self.conv.bias


def against_pyg(edges: Tensor, num_src: int) -> tuple[Adjacency, Calls]:
    r"""One layer or sum, forward and backward, by us and by PyG on a sorted ``edge_index``."""
    torch.manual_seed(0)
    adj = Adjacency.from_edge_index(edges, num_src, num_src)
    x = torch.randn(num_src, COLUMNS, requires_grad=True)
    conv = GATConv(COLUMNS, WIDTH, HEADS, add_self_loops=False)
    layer, grad = Attention(conv), torch.randn(num_src, COLUMNS)
    inputs = [x, *conv.parameters()]

    def pyg(op: str) -> Callable[[], Tensor]:
        return lambda: scatter(x.index_select(0, edges[0]), edges[1], 0, num_src, op)

    adj.transposed  # noqa: B018  built once for a share, whatever is trained on it
    return adj, {
        "gat": backward_too(lambda: layer(x, adj), inputs, grad),
        "gat, PyG": backward_too(lambda: conv(x, edges), inputs, grad),
        "sum": backward_too(lambda: aggregate.aggregate_sum(adj, x), [x], grad),
        "sum, PyG": backward_too(pyg("sum"), [x], grad),
        "max": backward_too(lambda: aggregate.aggregate_max(adj, x), [x], grad),
        "max, PyG": backward_too(pyg("max"), [x], grad),
    }


def peak_of(name: str, calls: Calls) -> float:
    r"""MB that a call takes at its peak above what the process held before."""
    forget_peak_memory()
    before = peak_memory()
    calls[name]()
    return (peak_memory() - before) / 1e6


def parse() -> argparse.Namespace:
    r"""The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--destinations", type=int, default=200_000)
    parser.add_argument("--sources", type=int, default=250_000)
    parser.add_argument("--edges", type=int, default=4_000_000)
    parser.add_argument(
        "--pyg-edges",
        type=int,
        default=1_000_000,
        help="edges of the comparison with PyG, over a "
        "fourth of the sources; PyG holds several messages of 512 bytes for each",
    )
    parser.add_argument("--skew", type=float, default=0.0, help="heavier tails of the degrees")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # the part of a child process
    return parser.parse_args()


def main() -> None:
    r"""Measures, prints the table and the JSON object."""
    args = parse()
    small = args.sources // 4
    if args.peak:
        torch.set_num_threads(1)
        _, calls = against_pyg(random_edges(small, small, args.pyg_edges, args.skew), small)
        print(peak_of(args.peak, calls))
        return

    tuned = tune_allocator()
    result: dict[str, object] = {
        "edges": args.edges,
        "skew": args.skew,
        "allocator_tuned": tuned,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    console, table = Console(stderr=True), Table("ms", *(f"{count} threads" for count in args.threads))
    adj = Adjacency.from_edge_index(
        random_edges(args.destinations, args.sources, args.edges, args.skew), args.sources, args.destinations
    )
    adj.transposed  # noqa: B018  built before anything is timed
    edges = random_edges(small, small, args.pyg_edges, args.skew)
    rows: dict[str, list[str]] = {}
    for count in args.threads:
        torch.set_num_threads(count)
        taken = sums(adj, args.rounds)
        layers = medians(against_pyg(edges, small)[1], max(3, args.rounds // 2))
        ratios = bound_shares(adj, taken) | {
            f"{name}_time_vs_pyg": layers[name] / layers[f"{name}, PyG"] for name in ("gat", "sum", "max")
        }
        result |= {f"{name}_{count}_thread{'s' * (count > 1)}": value for name, value in ratios.items()}
        result[f"ms_{count}_thread{'s' * (count > 1)}"] = taken | {
            f"{name} (PyG's case)": ms for name, ms in layers.items()
        }
        for name, ms in (
            taken | {f"{name} (PyG's case)": ms for name, ms in layers.items()} | ratios
        ).items():
            rows.setdefault(name, []).append(f"{ms:.3g}" if ms < 10 else f"{ms:.0f}")
    for name in ("gat", "sum", "max"):
        peaks = [
            float(
                subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--peak",
                        f"{name}{suffix}",
                        "--sources",
                        str(args.sources),
                        "--pyg-edges",
                        str(args.pyg_edges),
                        "--skew",
                        str(args.skew),
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for suffix in ("", ", PyG")
        ]
        result[f"{name}_memory_mb"], result[f"{name}_memory_vs_pyg"] = peaks, peaks[0] / peaks[1]
        rows[f"{name} peak MB, ours and PyG's"] = [f"{peak:.0f}" for peak in peaks][: len(args.threads)]

    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
