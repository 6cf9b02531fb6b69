r"""Answering one hop from a share.

What the kernels read of a share is looked up once and kept as long as the share: the edges of each type, raw ids,
and, for a time attribute, the edges of each destination in the order of their times.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from partpar.errors import SamplingError
from partpar.graph import EdgeType, Frame, GraphData
from partpar.kernels import sample
from partpar.serving.messages import STRATEGIES, HopReply, HopRequest

__all__ = ["HopReply", "HopRequest", "answer_hop", "forget_attribute"]

_NONE = np.empty(0, np.int64)
MAX_DRAWS = 1 << 40  # more than any memory holds


@dataclass
class _Edges:
    r"""What the kernels read of one edge type."""

    first: int  # id of the first owned destination
    first_src: int  # and of the first owned source
    indptr: np.ndarray
    indices: np.ndarray
    dst_raw_ids: np.ndarray
    halo_ids: np.ndarray
    src_raw_ids: np.ndarray
    edge_ids: np.ndarray
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    # By time attribute: the order of edges by destination and time, and the times in that order; None: no such.
    times: dict[str, tuple[np.ndarray, np.ndarray] | None] = field(default_factory=dict)


_kept: weakref.WeakKeyDictionary[GraphData, dict[EdgeType, _Edges]] = weakref.WeakKeyDictionary()


def answer_hop(share: GraphData, request: HopRequest, max_draws: int = MAX_DRAWS) -> HopReply:
    r"""Draws in-neighbours of owned nodes; any number of threads may do so at a time.

    Args:
        share: The share that owns all destinations asked for. Where :obj:`time_attr` is a node attribute, its sources
            must have it too, owned nodes and halo: ``share.node(type, "src")[time_attr]``.
        request: See :class:`~partpar.serving.messages.HopRequest`.
        max_draws: How many neighbours to draw at most.

    Raises:
        SamplingError: An id is not owned here, an attribute is missing or of the wrong shape, or there are more
            neighbours to draw.
    """
    edge_type = request.edge_type
    if edge_type not in share.edge_types:
        raise SamplingError(f"expected an edge type of {share.edge_types}, found {edge_type}")
    n = request.ids.numel()
    _check_rows("ids", request.ids, n)
    if request.fanout < -1:
        raise SamplingError(f"expected a fan-out of at least -1 (all neighbours), found {request.fanout}")
    if request.temporal_strategy not in STRATEGIES:
        raise SamplingError(
            f"expected a temporal strategy of {STRATEGIES}, found {request.temporal_strategy!r}"
        )
    edges = _edges_of(share, edge_type)
    rows = request.ids - edges.first
    num_dst = edges.indptr.shape[0] - 1
    if n and not 0 <= int(rows.min()) <= int(rows.max()) < num_dst:
        wrong = request.ids[(rows < 0) | (rows >= num_dst)]
        raise SamplingError(
            f"part {share.part_id} owns ids {edges.first} to {edges.first + num_dst - 1} of type {edge_type[2]!r}; "
            f"found {wrong.numel()} others, the first {int(wrong[0])}"
        )

    lo, hi = sample.windows(edges.indptr, rows.numpy())
    order = _NONE
    if request.time_attr is not None:
        timed = _times_of(share, edge_type, edges, request.time_attr)
        if timed is not None:
            if request.times is None:
                raise SamplingError(f"expected a time for each row, since {request.time_attr!r} restricts it")
            _check_rows("times", request.times, n)
            order, sorted_times = timed
            sample.shrink_to_time(lo, hi, sorted_times, request.times.numpy())
            if request.temporal_strategy == "last" and request.fanout >= 0:
                sample.shrink_to_last(lo, hi, request.fanout)
    if not request.replace and request.fanout > edges.indices.shape[0]:
        request = replace(request, fanout=edges.indices.shape[0])  # room for no more picks than there are edges
    if request.fanout < 0 or n * request.fanout > max_draws:
        draws = n * request.fanout if request.replace and request.fanout >= 0 else _num_draws(lo, hi, request.fanout)
        if draws > max_draws:
            raise SamplingError(f"expected at most {max_draws} neighbours at a time, found {draws}; ask for fewer rows, or for fewer of each")
    positions, counts = _draw(share, request, edges, rows.numpy(), lo, hi, order)
    if order is not _NONE:
        sample.reorder(positions, order)
    drawn = sample.gather(
        positions, edges.indices, edges.first_src, edges.halo_ids, edges.src_raw_ids, edges.edge_ids
    )
    ids, raw_ids, edge_ids = (torch.from_numpy(column) for column in drawn)
    edge_rows = _ids(share.edge(edge_type), "ids")[positions] if request.with_edge_rows else None
    return HopReply(
        ids,
        raw_ids,
        edge_ids,
        torch.from_numpy(counts),
        None if edge_rows is None else torch.from_numpy(edge_rows),
    )


def _num_draws(lo: np.ndarray, hi: np.ndarray, fanout: int) -> int:
    return int((hi - lo if fanout < 0 else np.minimum(hi - lo, fanout)).sum())


def forget_attribute(share: GraphData, name: str) -> None:
    r"""Has weights or times of that name read again: they were changed."""
    for edges in _kept.get(share, {}).values():
        edges.weights.pop(name, None)
        edges.times.pop(name, None)


def _draw(
    share: GraphData,
    request: HopRequest,
    edges: _Edges,
    rows: np.ndarray,
    lo: np.ndarray,
    hi: np.ndarray,
    order: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    if request.fanout == -1:
        return sample.draw_all(lo, hi)
    streams = sample.streams_of(np.uint64(request.key), edges.dst_raw_ids, rows)
    if request.disjoint_ids is not None:
        _check_rows("disjoint_ids", request.disjoint_ids, rows.shape[0])
        sample.split_streams(streams, request.disjoint_ids.numpy())
    weights = None
    if request.weight_attr is not None:
        weights = _weights_of(share, request.edge_type, edges, request.weight_attr)
    if weights is None:
        uniform = sample.draw_uniform_again if request.replace else sample.draw_uniform
        return uniform(lo, hi, streams, request.fanout)
    weighted = sample.draw_weighted_again if request.replace else sample.draw_weighted
    return weighted(lo, hi, streams, request.fanout, order, weights)


def _check_rows(name: str, rows: Tensor, n: int) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.numel() != n:
        raise SamplingError(
            f"{name}: expected int64 of shape [{n}], found {rows.dtype} of shape {tuple(rows.shape)}"
        )


def _edges_of(share: GraphData, edge_type: EdgeType) -> _Edges:
    kept = _kept.setdefault(share, {})
    if edge_type not in kept:
        src_type, _, dst_type = edge_type
        indptr, indices = share.csc(edge_type)
        dst, src = share.node(dst_type), share.node(src_type, "src")
        kept[edge_type] = _Edges(
            int(share.offsets(dst_type)[share.part_id]),
            int(share.offsets(src_type)[share.part_id]),
            indptr.numpy(),
            indices.numpy(),
            _ids(dst, "raw_ids"),
            _ids(src, "ids")[share.num_owned(src_type) :],
            _ids(src, "raw_ids"),
            _ids(share.edge(edge_type), "raw_ids"),
        )
    return kept[edge_type]


def _ids(frame: Frame, name: str) -> np.ndarray:
    # A graph that was never cut has no other ids than its rows.
    return (frame[name] if name in frame else torch.arange(frame.num_rows)).numpy()


def _weights_of(share: GraphData, edge_type: EdgeType, edges: _Edges, name: str) -> np.ndarray | None:
    if name not in edges.weights:
        frame = share.edge(edge_type)
        if name not in frame:
            if not any(name in share.edge(other) for other in share.edge_types):
                raise SamplingError(f"weight_attr: expected an edge attribute, found none called {name!r}")
            return None  # of several edge types, those that have no weights are drawn uniformly
        weights = frame[name]
        if weights.dim() != 1 or weights.dtype.is_complex:
            raise SamplingError(
                f"weight_attr {name!r} of {frame.what}: expected one number each, found shape {tuple(weights.shape)}"
            )
        if not weights.dtype.is_floating_point:
            weights = weights.to(torch.float64)
        if not bool((weights >= 0).all() & (weights < float("inf")).all()):
            raise SamplingError(
                f"weight_attr {name!r} of {frame.what}: expected finite numbers of at least 0, found others"
            )
        # Two dtypes are enough for the kernels to be compiled for.
        edges.weights[name] = (
            weights if weights.dtype == torch.float64 else weights.to(torch.float32)
        ).numpy()
    return edges.weights[name]


def _times_of(
    share: GraphData, edge_type: EdgeType, edges: _Edges, name: str
) -> tuple[np.ndarray, np.ndarray] | None:
    if name not in edges.times:
        times = _edge_times(share, edge_type, name)
        if times is None:
            edges.times[name] = None
        else:
            dst = np.repeat(np.arange(edges.indptr.shape[0] - 1), np.diff(edges.indptr))
            order = np.lexsort((times, dst))  # stable: what is of one time stays in the order of raw ids
            edges.times[name] = order, times[order]
    return edges.times[name]


def _edge_times(share: GraphData, edge_type: EdgeType, name: str) -> np.ndarray | None:
    src_type = edge_type[0]
    frame = share.edge(edge_type)
    if name in frame:
        return _time_column(frame, name)
    owned, sources = share.node(src_type), share.node(src_type, "src")
    if name not in owned:
        frames = [share.node(t) for t in share.node_types] + [share.edge(t) for t in share.edge_types]
        if not any(name in other for other in frames):
            raise SamplingError(f"time_attr: expected a node or edge attribute, found none called {name!r}")
        return None  # of several types, those without times restrict nothing
    if name not in sources and sources.num_rows > owned.num_rows:
        raise SamplingError(
            f"time_attr {name!r}: expected it for the halo of type {src_type!r} as well; "
            f"fetch those rows from their owners and set share.node({src_type!r}, 'src')[{name!r}]"
        )
    column = _time_column(sources if name in sources else owned, name)
    return column[share.csc(edge_type)[1].numpy()]


def _time_column(frame: Frame, name: str) -> np.ndarray:
    times = frame[name]
    if times.dim() != 1 or times.dtype.is_floating_point or times.dtype == torch.bool:
        raise SamplingError(
            f"time_attr {name!r} of {frame.what}: expected one integer each, found {times.dtype} of shape {tuple(times.shape)}"
        )
    return times.to(torch.int64).numpy()
