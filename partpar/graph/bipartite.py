r"""A share made by hand from bipartite edges."""

from __future__ import annotations

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.graph.data import GraphData
from partpar.graph.frame import Frame
from partpar.graph.structure import EDGE, NODE


def from_bipartite(
    edge_index: Tensor,
    num_src: int | None,
    num_dst: int | None,
    raw_src_ids: Tensor | None,
    raw_dst_ids: Tensor | None,
) -> GraphData:
    """See :meth:`GraphData.from_bipartite`."""
    if edge_index.dtype != torch.int64 or edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise GraphError(
            f"edge_index: expected int64 of shape [2, E], found {edge_index.dtype} of shape {tuple(edge_index.shape)}"
        )
    src_ids = _ids("src", edge_index[0], num_src, raw_src_ids)
    dst_ids = _ids("dst", edge_index[1], num_dst, raw_dst_ids)

    # Destinations first, then the sources that are no destinations.
    kept = dst_ids.numel() <= src_ids.numel() and torch.equal(src_ids[: dst_ids.numel()], dst_ids)
    if kept:
        ordered = src_ids
    else:
        others = src_ids[~torch.isin(src_ids, dst_ids)]
        ordered = torch.cat([dst_ids, others.sort().values])
    input_rows = _find(src_ids, ordered)
    place = torch.empty_like(src_ids)
    place[input_rows[input_rows >= 0]] = (input_rows >= 0).nonzero().flatten()

    nodes = Frame(dst_ids.numel(), {"raw_ids": dst_ids}, "destination nodes")
    sources = Frame(ordered.numel(), {"raw_ids": ordered, "input_rows": input_rows}, "source nodes")
    edges = Frame(edge_index.size(1), what="edges")
    moved = torch.stack([place[edge_index[0]], edge_index[1]])
    return GraphData({NODE: nodes}, {EDGE: edges}, {EDGE: moved}, sources={NODE: sources})


def _ids(side: str, index: Tensor, num: int | None, raw_ids: Tensor | None) -> Tensor:
    """The raw ids of one side, all checked."""
    largest = int(index.max()) if index.numel() else -1
    if num is None:
        num = largest + 1 if raw_ids is None else raw_ids.numel()
    raw_ids = torch.arange(num) if raw_ids is None else raw_ids
    if raw_ids.dtype != torch.int64 or tuple(raw_ids.shape) != (num,):
        raise GraphError(
            f"raw_{side}_ids: expected int64 of shape [{num}], found {raw_ids.dtype} of shape {tuple(raw_ids.shape)}"
        )
    if raw_ids.unique().numel() != num:
        raise GraphError(f"raw_{side}_ids: expected {num} distinct ids, found {raw_ids.unique().numel()}")
    if largest >= num or (index.numel() and int(index.min()) < 0):
        raise GraphError(
            f"edge_index: expected {side} indices from 0 to {num - 1}, found {int(index.min())} to {largest}"
        )
    return raw_ids


def _find(haystack: Tensor, needles: Tensor) -> Tensor:
    """Where each needle stands in the haystack; -1 where it does not."""
    if haystack.numel() == 0:
        return torch.full_like(needles, -1)
    values, rows = haystack.sort()
    at = torch.searchsorted(values, needles).clamp_(max=values.numel() - 1)
    return torch.where(values[at] == needles, rows[at], -1)
