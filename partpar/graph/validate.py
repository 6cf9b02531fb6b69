r"""What a valid graph is: structure within bounds, features finite, labels in range."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.graph.data import GraphData
from partpar.graph.structure import CSC

_CHUNK = 1 << 22  # rows looked at at once, so that a memory-mapped graph is never loaded whole


def validate(graph: GraphData, allow_nan: bool, num_classes: int | None) -> None:
    """See :meth:`GraphData.validate`."""
    validate_structure(graph)
    for node_type in graph.node_types:
        frame = graph.node(node_type)
        for name, value in frame.items():
            if not allow_nan:
                _check_finite(f"attribute {name!r} of {frame.what}", value)
        if "y" in frame and num_classes is not None:
            check_classes(f"labels 'y' of {frame.what}", frame["y"])
        if "y" in frame and not frame["y"].dtype.is_floating_point:
            _check_labels(f"labels 'y' of {frame.what}", frame["y"], num_classes)
    for edge_type in graph.edge_types:
        for name, value in graph.edge(edge_type).items():
            if not allow_nan:
                _check_finite(f"attribute {name!r} of {graph.edge(edge_type).what}", value)


def check_classes(what: str, y: Tensor) -> None:
    r"""Refuses labels that are not one integer a node, which is what a class is told by.

    Raises:
        GraphError: They are floating, or of shape ``[num_nodes, 1]``.
    """
    floating, column = y.dtype.is_floating_point, y.dim() == 2 and y.size(1) == 1
    if floating or column:
        remedy = f"y{'.squeeze(1)' if column else ''}{'.long()' if floating else ''}"
        raise GraphError(
            f"{what}: expected one integer a node to tell its class, found {y.dtype} of shape {tuple(y.shape)}; use {remedy}"
        )


def validate_structure(graph: GraphData) -> None:
    r"""The part of :meth:`GraphData.validate` that partitioning and routing rely on."""
    for edge_type in graph.edge_types:
        piece = graph._structure[edge_type]
        if isinstance(piece, CSC):
            continue  # was checked when the share was opened
        if piece.dtype != torch.int64 or piece.dim() != 2 or piece.size(0) != 2:
            raise GraphError(
                f"edge_index of {edge_type}: expected int64 of shape [2, E], found {piece.dtype} of shape {tuple(piece.shape)}"
            )
        for row, side, bound in (
            (0, "source", graph.node(edge_type[0], "src").num_rows),
            (1, "destination", graph.node(edge_type[2], "dst").num_rows),
        ):
            _check_range(f"edge_index of {edge_type}: {side} indices", piece[row], 0, bound)


def _chunks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, x.size(0), _CHUNK):
        yield start, x[start : start + _CHUNK]


def _check_range(what: str, x: Tensor, low: int, high: int) -> None:
    count, first = 0, None
    for start, chunk in _chunks(x):
        if chunk.numel() and (int(chunk.min()) < low or int(chunk.max()) >= high):
            bad = ((chunk < low) | (chunk >= high)).nonzero()
            count += bad.size(0)
            first = start + int(bad[0, 0]) if first is None else first
    if first is not None:
        raise GraphError(
            f"{what}: expected {low} to {high - 1}, found {count} outside, the first at position {first}: {int(x[first])}"
        )


def _check_finite(what: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point or x.numel() == 0:
        return
    count, first = 0, None
    for start, chunk in _chunks(x):
        bad = (~torch.isfinite(chunk)).nonzero()
        count += bad.size(0)
        first = [start + int(bad[0, 0]), *bad[0, 1:].tolist()] if bad.numel() and first is None else first
    if first is not None:
        raise GraphError(
            f"{what}: expected finite numbers, found {count} NaN or infinite, the first at {first}; allow_nan=True accepts them"
        )


def _check_labels(what: str, y: Tensor, num_classes: int | None) -> None:
    high = torch.iinfo(y.dtype).max if num_classes is None else num_classes
    if y.dtype not in (torch.bool, torch.uint8):
        _check_range(what, y.flatten(), -1, high)
    elif num_classes is not None:
        _check_range(what, y.flatten().to(torch.int64), 0, high)
