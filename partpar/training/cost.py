r"""What an epoch on the full graph will take: seconds, bytes and memory, from a partition's report.

The model counts what each rank does in an epoch and multiplies by what the machine takes for a unit of it:

- *summed bytes*: every in-edge reads a row, forwards and backwards, in each layer whose input changes;
- *multiply-adds* of the linear maps, forwards and backwards;
- *row bytes*: activations, written and read by everything that works row by row;
- *moved bytes*: halo rows, picked, copied and added;
- what an epoch takes for nothing.

Exchanges take ``latency + bytes / bandwidth`` and are hidden behind the interior's sums of the same layer;
what is longer is waited for. The slowest rank counts. The rates are found by :func:`fit` from measured
epochs, as linear least squares without negative rates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from partpar.errors import PartparError

FLOAT, INDEX, DIRECTIONS = (
    4,
    8,
    2,
)  # bytes of a value, and of an index with its weight; forwards and backwards
LINEAR_MAPS = {"gcn": 1, "sage": 2}  # for each layer


class CostError(PartparError, ValueError):
    r"""There is nothing to predict from."""


@dataclass(frozen=True)
class Part:
    r"""What one rank holds: nodes it owns, halo rows, in-edges, those of them from the halo, rows sent in one
    exchange."""

    owned: float
    halo: float
    edges: float
    cut_edges: float
    sent: float


@dataclass(frozen=True)
class Network:
    r"""Bandwidth of a machine in each direction, Gbit/s; seconds until a message arrives; ranks that share a
    machine."""

    gbit: float = 10.0
    latency: float = 50e-6
    ranks_per_machine: int = 1

    def seconds(self, num_bytes: float) -> float:
        r"""How long one exchange of so many bytes takes a rank, in the direction that has more."""
        if num_bytes <= 0:
            return 0.0
        return self.latency + num_bytes * 8 * self.ranks_per_machine / (self.gbit * 1e9)


@dataclass(frozen=True)
class Training:
    r"""The model that is trained: ``"gcn"`` or ``"sage"``, its widths and layers. The first layer's halo is
    kept."""

    model: str = "gcn"
    features: int = 128
    hidden: int = 128
    classes: int = 32
    layers: int = 3

    def __post_init__(self) -> None:
        if self.model not in LINEAR_MAPS or min(self.features, self.hidden, self.classes, self.layers) < 1:
            raise CostError(f"expected a model of {', '.join(LINEAR_MAPS)} with sizes from 1, found {self}")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        r"""Input and output width of each layer."""
        widths = [self.features, *[self.hidden] * (self.layers - 1), self.classes]
        return list(pairwise(widths))

    @property
    def exchanged(self) -> list[int]:
        r"""Width of the rows that each layer after the first sums and sends: the narrower one."""
        return [min(shape) for shape in self.shapes[1:]]


@dataclass(frozen=True)
class Rates:
    r"""What one rank takes: seconds for a byte, a multiply-add or an epoch, and bytes of memory for a thing
    held.

    The defaults are rough figures for one core of a machine of two. ``benchmarks/network.py --rates FILE``
    measures those of a machine.
    """

    summed_byte: float = 1.0e-10
    multiply_add: float = 2.5e-11
    row_byte: float = 1.0e-9
    moved_byte: float = 1.5e-9
    epoch: float = 2.0e-3
    memory_base: float = 1.2e8
    memory_edge: float = 40.0
    memory_row_byte: float = 2.0
    memory_halo_byte: float = 2.0

    @classmethod
    def read(cls, path: str | Path) -> Rates:
        r"""Reads what :meth:`write` wrote.

        Raises:
            CostError: If the file holds something else.
        """
        known = {field.name for field in fields(cls)}
        try:
            raw = json.loads(Path(path).read_text())
            return cls(**{name: float(raw[name]) for name in known})
        except (ValueError, TypeError, KeyError) as error:
            raise CostError(
                f"{path}: expected a JSON object of numbers {', '.join(sorted(known))}, as benchmarks/network.py --rates "
                f"writes it; found {error}"
            ) from error

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Case:
    r"""An epoch that was measured: on which parts, training what, over which network (:obj:`None`: the
    machine's own), and what the slowest rank took, seconds and bytes."""

    parts: Sequence[Part]
    training: Training
    network: Network | None
    seconds: float
    memory: float


@dataclass(frozen=True)
class Prediction:
    r"""An epoch as it should be.

    Args:
        seconds: Of the slowest rank.
        exchange: Seconds that its rows are on their way.
        visible: Part of them that it waits.
        bytes_sent: By all ranks together.
        memory: Peak of the largest rank, bytes above what importing torch takes.
    """

    seconds: float
    exchange: float
    visible: float
    bytes_sent: float
    memory: float


def parts_of(report: dict[str, Any]) -> list[Part]:
    r"""The parts that a partition's quality report tells of.

    Raises:
        CostError: If there are several types of nodes or edges.
    """
    if len(report["nodes"]) != 1 or len(report["edges"]) != 1:
        raise CostError(
            f"expected a graph of one node type and one edge type to predict for, found {len(report['nodes'])} and "
            f"{len(report['edges'])}"
        )
    (nodes,), (edges,) = report["nodes"].values(), report["edges"].values()
    sent = [sum(row) for row in nodes["traffic"]]
    columns = (nodes["owned"], nodes["halo"], edges["edges"], edges["cut_edges"], sent)
    return [Part(*numbers) for numbers in zip(*columns, strict=True)]


def even_parts(
    num_nodes: float, num_edges: float, num_parts: int, halo: float, edge_cut: float
) -> list[Part]:
    r"""Equal parts of a graph that was not cut yet.

    Args:
        num_nodes: In all.
        num_edges: In all, directed.
        num_parts: How many parts.
        halo: Halo rows for each owned one.
        edge_cut: Share of edges between parts.
    """
    owned, edges = num_nodes / num_parts, num_edges / num_parts
    return [Part(owned, halo * owned, edges, edge_cut * edges, halo * owned)] * num_parts


def work(part: Part, training: Training) -> np.ndarray:
    r"""What a rank does in an epoch, in the units of the first five :class:`Rates`."""
    maps = LINEAR_MAPS[training.model]
    summed = sum(DIRECTIONS * part.edges * (FLOAT * width + INDEX) for width in training.exchanged)
    # Weights' gradients and, but for the first layer, the inputs' are products of the same size.
    multiplied = sum((3 if i else 2) * maps * part.owned * a * b for i, (a, b) in enumerate(training.shapes))
    rows = sum(FLOAT * part.owned * (a + b) for a, b in training.shapes)
    moved = sum(DIRECTIONS * FLOAT * (part.halo + part.sent) * width for width in training.exchanged)
    return np.array([summed, multiplied, rows, moved, 1.0], dtype=np.float64)


def held(part: Part, training: Training) -> np.ndarray:
    r"""What a rank holds at its peak, in the units of the last four :class:`Rates`."""
    rows = FLOAT * part.owned * (training.features + sum(b for _, b in training.shapes))
    halo = FLOAT * (
        part.halo * training.features + (part.halo + part.sent) * max(training.exchanged, default=0)
    )
    return np.array([1.0, part.edges, rows, halo], dtype=np.float64)


def predict(
    parts: Sequence[Part], training: Training, network: Network | None, rates: Rates | None = None
) -> Prediction:
    r"""Predicts an epoch.

    Args:
        parts: What each rank holds.
        training: What is trained.
        network: Between machines; :obj:`None` for ranks of one machine, who copy.
        rates: Of the machine.
    """
    rates = Rates() if rates is None else rates
    per_unit = np.array(
        [rates.summed_byte, rates.multiply_add, rates.row_byte, rates.moved_byte, rates.epoch]
    )
    per_thing = np.array(
        [rates.memory_base, rates.memory_edge, rates.memory_row_byte, rates.memory_halo_byte]
    )
    ranks = []
    for part in parts:
        exchange = visible = 0.0
        for width in training.exchanged if network is not None else []:
            taken = network.seconds(FLOAT * width * max(part.halo, part.sent)) if network is not None else 0.0
            interior = rates.summed_byte * (part.edges - part.cut_edges) * (FLOAT * width + INDEX)
            exchange += DIRECTIONS * taken
            visible += DIRECTIONS * max(0.0, taken - interior)
        seconds = float(work(part, training) @ per_unit) + visible
        ranks.append((seconds, exchange, visible, float(held(part, training) @ per_thing)))
    slowest = max(ranks)
    sent = sum(DIRECTIONS * FLOAT * part.sent * width for part in parts for width in training.exchanged)
    return Prediction(*slowest[:3], sent, max(rank[3] for rank in ranks))


def fit(cases: Sequence[Case]) -> Rates:
    r"""Finds the rates from epochs measured on the machine's own network, each weighed by its relative error.

    Args:
        cases: Epochs; those over another network are left out.

    Raises:
        CostError: If fewer cases were measured than there are rates of time.
    """
    cases = [case for case in cases if case.network is None]
    if len(cases) < 5:
        raise CostError(
            f"expected at least 5 epochs on the machine's own network to fit 5 rates, found {len(cases)}"
        )

    def largest(of: Any, case: Case) -> np.ndarray:
        return np.array(
            max(
                (of(part, case.training) for part in case.parts),
                key=lambda counts: float(counts[0] + counts[1]),
            )
        )

    seconds = _non_negative([largest(work, case) / case.seconds for case in cases])
    memory = _non_negative([largest(held, case) / case.memory for case in cases])
    return Rates(*seconds, *memory)


def _non_negative(rows: Sequence[np.ndarray]) -> list[float]:
    r"""The ``r >= 0`` with ``rows @ r`` nearest to 1, by Lawson and Hanson's active sets (Solving Least
    Squares Problems, 1974, chapter 23)."""
    matrix = np.stack(rows)
    scale = matrix.max(0)
    scale[scale == 0] = 1.0
    a, target = matrix / scale, np.ones(len(matrix))
    found, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(3 * a.shape[1]):
        slope = a.T @ (target - a @ found)
        if free.all() or slope[~free].max() <= 1e-9:
            break
        free[np.flatnonzero(~free)[slope[~free].argmax()]] = True
        while True:
            wanted = np.zeros_like(found)
            wanted[free] = np.linalg.lstsq(a[:, free], target, rcond=None)[0]
            negative = free & (wanted <= 0)
            if not negative.any():
                break
            step = (found[negative] / np.maximum(found[negative] - wanted[negative], 1e-300)).min()
            found += step * (wanted - found)
            free &= found > 1e-12
        found = wanted
    return [float(value) for value in found / scale]
