r"""A layer over all owned nodes, some of them at a time, between rows that are kept as sharded tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from partpar import exchange
from partpar.kernels.adjacency import Adjacency
from partpar.route import Route
from partpar.sharded.policy import PartPolicy
from partpar.sharded.tensor import DistTensor

CHUNK_SIZE = 65536
Layer = Callable[[tuple[Tensor, Tensor], Adjacency, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class SourceIds:
    r"""Where the rows of a route's sources live.

    Args:
        policy: Which rank owns which ids.
        ids: ``[num_src]`` int64.
    """

    policy: PartPolicy
    ids: Tensor


_source_ids: WeakKeyDictionary[Route, SourceIds] = WeakKeyDictionary()


def source_ids(route: Route) -> SourceIds:
    r"""Numbers the owned rows of all ranks, one rank after the other; found once for a route (collective)."""
    if route not in _source_ids:
        told = exchange.agree(route.group, "source_ids", {"_owned": route.num_owned})
        offsets = [0]
        for fields in told:
            offsets.append(offsets[-1] + fields["_owned"])
        own = torch.arange(offsets[route.rank], offsets[route.rank + 1])
        _source_ids[route] = SourceIds(PartPolicy(tuple(offsets)), route.apply(own))
    return _source_ids[route]


def in_chunks(
    layer: Layer,
    x: DistTensor,
    edge_index: Tensor | Adjacency,
    route: Route,
    per_edge: Mapping[str, Tensor],
    chunk_size: int = CHUNK_SIZE,
) -> DistTensor:
    r"""Runs a layer on :obj:`chunk_size` destinations at a time (collective). What is held beside input and output are
    the rows that one chunk reads; those of the whole halo are not.

    Args:
        layer: Called with the rows of a block's sources and destinations, the block, and values per edge.
        x: Rows of all nodes, laid out as :func:`source_ids` says.
        edge_index: A share's edges.
        route: Of the share.
        per_edge: Values for each edge, in the order of :obj:`edge_index`.
        chunk_size: At least 1.

    Returns:
        Rows of all nodes.
    """
    where, out = source_ids(route), None
    if isinstance(edge_index, Tensor):
        edge_index = Adjacency.from_edge_index(edge_index, route.num_src, route.num_owned)
        assert edge_index.edge_ids is not None
        per_edge = {name: values[edge_index.edge_ids] for name, values in per_edge.items()}
    sizes = torch.tensor(where.policy.offsets).diff()
    for first in range(0, max(int(sizes.max()), 1), chunk_size):  # as often on every rank
        first = min(first, route.num_owned)
        last = min(first + chunk_size, route.num_owned)
        low, high = int(edge_index.indptr[first]), int(edge_index.indptr[last])
        needed, indices = edge_index.indices[low:high].unique(return_inverse=True)
        indptr = edge_index.indptr[first : last + 1] - low
        block = Adjacency(indptr, indices, needed.numel(), last - first, check=False)
        sources = x[where.ids[needed]]
        rows = layer((sources, x.local_rows[first:last]), block, {k: v[low:high] for k, v in per_edge.items()})
        if out is None:
            shape = (where.policy.num_rows, *rows.shape[1:])
            out = DistTensor(shape, rows.dtype, part_policy=where.policy, group=route.group)
        out.local_rows[first:last] = rows
    assert out is not None
    return out


def shard(x: Tensor, route: Route) -> DistTensor:
    r"""Owned rows as a sharded tensor (collective)."""
    policy = source_ids(route).policy
    out = DistTensor((policy.num_rows, *x.shape[1:]), x.dtype, part_policy=policy, group=route.group)
    out.local_rows.copy_(x)
    return out


