r"""From a pair of stores to the share that they describe, whether they were opened from one or made tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.graph import CSC, EDGE, NODE, EdgeType, Frame, GraphData, Part
from partpar.kernels.csr import compress
from partpar.serving.feature_store import LocalFeatureStore
from partpar.serving.graph_store import LocalGraphStore
from partpar.serving.owner import Type
from partpar.serving.partition import Group

NODE_TIME = "time"  # in a homogeneous store, any other time belongs to edges


def share_of(features: LocalFeatureStore, graph: LocalGraphStore, time_attr: str | None = None) -> GraphData:
    r"""The share of a part whose rows and edges two stores hold.

    Of stores that were opened from a partition, it is that share, with what was put into the feature store since then.
    Of others, it is cut by the partition books of nodes, which must be tensors: nodes of part p are numbered by raw id,
    edges into nodes of other parts are left to these. Rows are found by the raw ids that were put beside them; a tensor
    with a row for every node of the graph needs none.

    Args:
        features: Attributes of nodes and edges.
        graph: Edges, ``node_pb``, ``partition_idx`` and ``num_partitions``.
        time_attr: An attribute that is a time, which in a homogeneous store may stand among the nodes' and yet belong to
            edges: it does, unless it is called ``"time"``.

    Raises:
        GraphError: Something is missing or does not fit.
    """
    if graph.share is not None:
        share = graph.share
        kinds: list[Type] = [*share.node_types, *share.edge_types]
        for kind in kinds:
            frame = share.node(kind) if isinstance(kind, str) else share.edge(kind)
            _add_rows(features, _group(kind), kind, frame, frame["raw_ids"], time_attr, changed=True)
    else:
        share = _Cut(features, graph, time_attr).share()
    if features.labels is not None:
        _add_labels(share, features.labels)
    return share


def _group(kind: Type) -> Group:
    if kind == NODE:
        return None
    return (None, None) if kind == EDGE else kind


class _Cut:
    """One part, cut by tensors that say who owns each node."""

    def __init__(self, features: LocalFeatureStore, graph: LocalGraphStore, time_attr: str | None) -> None:
        self.features, self.graph, self.time_attr = features, graph, time_attr
        self.part, self.num_parts = graph.partition_idx, graph.num_partitions
        self.typed = bool(graph.meta and graph.meta.get("is_hetero"))
        books: Any = graph.node_pb if isinstance(graph.node_pb, Mapping) else {NODE: graph.node_pb}
        self.books: dict[str, Tensor] = {}
        for node_type, book in books.items():
            if not isinstance(book, Tensor):
                raise GraphError(f"node_pb of {node_type!r}: expected a tensor with the part of each node, found {book!r}")
            self.books[node_type] = book.to(torch.int64)
        # By type: ids, and the range of those owned here.
        self.offsets, self.ids, self.owned = {}, {}, {}
        for node_type, book in self.books.items():
            order = book.argsort(stable=True)
            counts = torch.bincount(book, minlength=self.num_parts)
            self.offsets[node_type] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            ids = torch.empty_like(book)
            ids[order] = torch.arange(book.numel())
            self.ids[node_type] = ids
            low, high = (int(self.offsets[node_type][self.part + k]) for k in (0, 1))
            self.owned[node_type] = order[low:high]

    def share(self) -> GraphData:
        edges = {}
        for attr in self.graph.get_all_edge_attrs():
            kind = tuple(attr.edge_type) if attr.edge_type is not None else EDGE
            edges[kind] = self._edges(attr, kind)
        sources = {t: self._sources(t, edges) for t in self.books}
        nodes, source_frames, edge_frames, structure = {}, {}, {}, {}
        for node_type, raw_ids in sources.items():
            owned = self.owned[node_type]
            nodes[node_type] = Frame(
                owned.numel(), {"raw_ids": owned, "ids": self.ids[node_type][owned]}, f"nodes of type {node_type!r}"
            )
            source_frames[node_type] = Frame(
                raw_ids.numel(), {"raw_ids": raw_ids, "ids": self.ids[node_type][raw_ids]}, f"sources of type {node_type!r}"
            )
            self._add(node_type, nodes[node_type], owned)
            if self.time_attr is not None and self.time_attr in nodes[node_type]:
                whole = self.features._feat.get((_group(node_type), self.time_attr))
                if isinstance(whole, Tensor) and whole.size(0) == self.books[node_type].numel():
                    source_frames[node_type][self.time_attr] = whole[raw_ids]
        for kind, (index, edge_ids, rows) in edges.items():
            local = {t: torch.full((self.books[t].numel(),), -1) for t in {kind[0], kind[2]}}
            src, dst = index
            local[kind[0]][sources[kind[0]]] = torch.arange(sources[kind[0]].numel())
            local_src = local[kind[0]][src]
            first = int(self.offsets[kind[2]][self.part])
            indptr, order = compress(self.ids[kind[2]][dst] - first, self.owned[kind[2]].numel())
            order = order.to(torch.int64)
            structure[kind] = CSC(indptr, local_src[order])
            frame = Frame(order.numel(), {"raw_ids": edge_ids[order]}, f"edges of type {kind}")
            self._add(kind, frame, edge_ids[order], rows[order])
            edge_frames[kind] = frame
        return GraphData(
            nodes, edge_frames, structure, {}, source_frames, Part(self.part, self.num_parts, self.offsets, "")
        )

    def _edges(self, attr: Any, kind: EdgeType) -> tuple[Tensor, Tensor, Tensor]:
        """Edges into owned nodes by raw ids, their own raw ids, and their rows in the store."""
        index = self.graph.get_edge_index(attr)
        index = torch.stack(list(index)) if isinstance(index, (tuple, list)) else index
        edge_ids = self.graph.get_edge_id(attr)
        edge_ids = torch.arange(index.size(1)) if edge_ids is None else edge_ids
        rows = (self.books[kind[2]][index[1]] == self.part).nonzero().flatten()
        rows = rows[edge_ids[rows].argsort(stable=True)]  # within a destination, edges stand in the order of raw ids
        return index[:, rows], edge_ids[rows], rows

    def _sources(self, node_type: str, edges: Mapping[EdgeType, tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Raw ids: owned, then the halo in the order of ids."""
        ids, owned = self.ids[node_type], self.owned[node_type]
        reached = [index[0] for kind, (index, _, _) in edges.items() if kind[0] == node_type]
        halo = torch.cat(reached).unique() if reached else owned[:0]
        halo = halo[self.books[node_type][halo] != self.part]
        return torch.cat([owned, halo[ids[halo].argsort()]])

    def _add(self, kind: Type, frame: Frame, raw_ids: Tensor, rows: Tensor | None = None) -> None:
        _add_rows(self.features, _group(kind), kind, frame, raw_ids, self.time_attr, rows)
        if kind == EDGE and self.time_attr is not None and self.time_attr != NODE_TIME and rows is not None:
            value = self.features._feat.get((None, self.time_attr))
            if isinstance(value, Tensor) and self.time_attr not in frame:
                frame[self.time_attr] = value[rows]


def _add_rows(
    features: LocalFeatureStore,
    group: Group,
    kind: Type,
    frame: Frame,
    raw_ids: Tensor,
    time_attr: str | None,
    rows: Tensor | None = None,
    changed: bool = False,
) -> None:
    """Takes a group's attributes over into a frame; with :obj:`changed` only those that are not the frame's own."""
    for (of, name), value in list(features._feat.items()):
        if of != group or not isinstance(value, Tensor):
            continue
        if isinstance(kind, str) and group is None and name == time_attr and name != NODE_TIME:
            continue  # a time of edges
        if changed and name in frame and frame[name] is value:
            continue
        known = features.get_global_id(group)
        if changed and value.size(0) == frame.num_rows:
            frame[name] = value
        elif known is not None and value.size(0) == known.numel():
            frame[name] = value[features.rows_of(group, raw_ids)]
        elif rows is not None and (rows.numel() == 0 or value.size(0) > int(rows.max())):
            frame[name] = value[rows]
        elif raw_ids.numel() == 0 or value.size(0) > int(raw_ids.max()):
            frame[name] = value[raw_ids]
        else:
            raise GraphError(
                f"attribute {name!r} of {group!r}: expected a row for each id that was put beside it, or for each of the "
                f"graph, found {value.size(0)} rows; call put_global_id first"
            )


def _add_labels(share: GraphData, labels: Any) -> None:
    """Labels that stand in a store by themselves: of nodes, or of edges, by raw id."""
    of: dict[Any, Tensor] = dict(labels) if isinstance(labels, Mapping) else {}
    if not of:
        sizes = {t: int(share.offsets(t)[-1]) for t in share.node_types}
        fitting: list[Any] = [t for t, size in sizes.items() if labels.size(0) == size]
        of = dict.fromkeys(fitting or share.edge_types, labels)
    for kind, values in of.items():
        frame = share.node(kind) if isinstance(kind, str) else share.edge(kind)
        raw_ids = frame["raw_ids"]
        if "y" not in frame and (raw_ids.numel() == 0 or int(raw_ids.max()) < values.size(0)):
            frame["y"] = values[raw_ids]
