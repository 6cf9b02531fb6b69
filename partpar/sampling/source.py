r"""What a loader may be given to sample from, and the service that answers for it."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from partpar.errors import SamplingError
from partpar.graph import CSC, EdgeType, Frame, GraphData
from partpar.kernels.csr import compress
from partpar.serving.feature_store import LocalFeatureStore
from partpar.serving.handmade import share_of
from partpar.serving.service import Service
from partpar.serving.start import start_service

_HIDDEN = ("ids", "raw_ids")  # which a batch has as n_id and e_id


@dataclass
class _Kept:
    service: Service
    users: int = 0


# A service speaks to other processes, so it is not made anew for each loader, nor ended by the garbage collector: the
# other ranks would not know.
_kept: dict[int, _Kept] = {}
_lock = threading.Lock()


class Source:
    r"""A service and who closes it. Loaders of one share use one service, which ends when the last of them is closed, or
    with the program.

    Args:
        data: A share; a service; a whole graph, ours or PyG's; or a pair of stores.
        timeout: Seconds until a part that does not answer counts as lost.
    """

    def __init__(self, data: Any, timeout: float) -> None:
        self._key: int | None = None
        if isinstance(data, Service):
            self.service = data
            return
        if isinstance(data, (Data, HeteroData)):
            data = GraphData.from_pyg_data(data)
        elif isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], LocalFeatureStore):
            data = share_of(data[0], data[1])
        if not isinstance(data, GraphData):
            raise SamplingError(
                f"data: expected a share, a service, PyG's Data or HeteroData, or a pair of stores, found {type(data).__name__}"
            )
        share = grouped(data)
        if share.num_parts == 1:  # answered in this process: nothing to share, nothing to end
            self.service = start_service(share, timeout=timeout)
            return
        with _lock:
            if id(share) not in _kept:  # the service keeps the share, so its id stays its own
                _kept[id(share)] = _Kept(start_service(share, timeout=timeout))
            self._key = id(share)
            _kept[self._key].users += 1
            self.service = _kept[self._key].service

    def close(self, end: bool = True) -> None:
        r"""Gives the service back, and ends it if nobody else uses it. May be called again.

        Args:
            end: Whether to end it; a loader that was merely dropped does not.
        """
        key, self._key = self._key, None
        with _lock:
            kept = None if key is None else _kept.get(key)
            if key is None or kept is None:
                return
            kept.users -= 1
            if kept.users > 0 or not end:
                return
            del _kept[key]
        kept.service.close()


@contextmanager
def opened(data: Any, timeout: float) -> Iterator[Source]:
    r"""A :class:`Source` for a loader that is being made, given back if that fails; arguments are the same."""
    source = Source(data, timeout)
    try:
        yield source
    except BaseException:
        source.close(end=False)
        raise


@atexit.register
def _close_all() -> None:
    while _kept:
        service = _kept.popitem()[1].service
        if hasattr(sys, "last_value"):  # the program ends by an error: nobody is waited for
            service.transport.abandon()
        service.close()


_grouped: WeakKeyDictionary[GraphData, GraphData] = WeakKeyDictionary()


def grouped(graph: GraphData) -> GraphData:
    r"""The graph with its edges grouped by destination, as shares have them: a share itself, or a whole graph as its
    only part, made once."""
    if graph.part is not None or all(_is_grouped(graph, t) for t in graph.edge_types):
        return graph
    if graph not in _grouped:
        _grouped[graph] = _group(graph)
    return _grouped[graph]


def _is_grouped(graph: GraphData, edge_type: EdgeType) -> bool:
    destinations = graph.edge_index(edge_type)[1]
    return not bool((destinations[1:] < destinations[:-1]).any())


def _group(graph: GraphData) -> GraphData:
    structure, edges = {}, {}
    for edge_type in graph.edge_types:
        src, dst = graph.edge_index(edge_type)
        indptr, order = compress(dst, graph.num_nodes(edge_type[2]))
        order = order.to(torch.int64)
        structure[edge_type] = CSC(indptr, src[order])
        frame = graph.edge(edge_type)
        columns: dict[str, Any] = {name: _reordered(frame, name, order) for name in frame}
        columns.setdefault("raw_ids", order)
        edges[edge_type] = Frame(frame.num_rows, columns, frame.what)
    return GraphData({t: graph.node(t) for t in graph.node_types}, edges, structure, graph.meta())


def _reordered(frame: Frame, name: str, order: Tensor) -> Any:
    return lambda: frame[name][order]


def attributes(share: GraphData, names: Any = None) -> dict[str | EdgeType, list[str]]:
    r"""Which attributes a batch brings: all of them, but ids.

    Args:
        share: Whose.
        names: Only these, of whatever type has them.
    """
    frames: dict[str | EdgeType, Frame] = {t: share.node(t) for t in share.node_types}
    frames.update({t: share.edge(t) for t in share.edge_types})
    if names is not None:
        unknown = set(names) - {name for frame in frames.values() for name in frame}
        if unknown:
            known = sorted({name for frame in frames.values() for name in frame} - set(_HIDDEN))
            raise SamplingError(f"attributes: expected names among {known}, found {sorted(unknown)}")
    return {
        kind: [name for name in frame if name not in _HIDDEN and (names is None or name in names)]
        for kind, frame in frames.items()
    }
