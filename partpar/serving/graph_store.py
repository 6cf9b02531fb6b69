r"""The edges of one part, behind PyG's :class:`~torch_geometric.data.GraphStore`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import EdgeAttr, GraphStore
from torch_geometric.utils import sort_edge_index
from typing_extensions import Self

from partpar.errors import IdError
from partpar.graph import EdgeType, GraphData
from partpar.serving.book import RangeBook
from partpar.serving.partition import is_typed, meta_of, open_part
from partpar.serving.service import Service

Book = Tensor | RangeBook
Key = tuple[Any, str]


class LocalGraphStore(GraphStore):
    r"""The edges that one part has, by raw ids: the names of ``torch_geometric.distributed.LocalGraphStore``.

    Attributes:
        num_partitions: Number of parts.
        partition_idx: This part.
        node_pb: Which part owns a node: a tensor with an entry for each, or a
            :class:`~partpar.serving.book.RangeBook`; in a heterogeneous graph, one for each node type.
        edge_pb: The same for edges.
        meta: ``{"is_hetero": ...}`` and more.
        share: The share it was opened from; :obj:`None` for one made of tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._edge_index: dict[Key, Any] = {}
        self._edge_attr: dict[Key, EdgeAttr] = {}
        self._edge_id: dict[Key, Any] = {}
        self.num_partitions, self.partition_idx = 1, 0
        self.node_pb: Book | dict[str, Book] | None = None
        self.edge_pb: Book | dict[EdgeType, Book] | None = None
        self.meta: dict[str, Any] | None = None
        self.is_sorted: bool | None = None
        self.share: GraphData | None = None
        self.service: Service | None = None

    @staticmethod
    def key(attr: EdgeAttr) -> Key:
        r"""What an edge type's edges in one layout are kept under."""
        return (attr.edge_type, attr.layout.value)

    # --- who owns what ------------------------------------------------------------------------------------------

    def get_partition_ids_from_nids(self, ids: Tensor, node_type: str | None = None) -> Tensor:
        r"""``[n]``: the part that owns each node.

        Args:
            ids: ``[n]`` raw ids.
            node_type: In a heterogeneous graph, their type.
        """
        return _parts(self.node_pb, self.meta, ids, node_type)

    def get_partition_ids_from_eids(self, eids: Tensor, edge_type: EdgeType | None = None) -> Tensor:
        r"""``[n]``: the part that has each edge, which is its destination's."""
        return _parts(self.edge_pb, self.meta, eids, edge_type)

    get_partition_id_from_nid = get_partition_ids_from_nids
    get_partition_id_from_eid = get_partition_ids_from_eids

    def attach(self, service: Service) -> None:
        r"""Lets books of ranges find any raw id, through the service's directory."""
        self.service = service
        if self.share is None:
            return
        nodes: Any = {t: RangeBook(service.offsets(t), _finder(service, t)) for t in service.node_types}
        edges: Any = {t: RangeBook(service.edge_offsets(t), _finder(service, t)) for t in service.edge_types}
        typed = is_typed(self.share)
        self.node_pb, self.edge_pb = (dict(b) if typed else next(iter(b.values())) for b in (nodes, edges))

    # --- ids of edges -------------------------------------------------------------------------------------------

    def put_edge_id(self, edge_id: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        r"""Keeps the raw ids of an edge type's edges, in their order; arguments as of ``put_edge_index``."""
        self._edge_id[self.key(self._edge_attr_cls.cast(*args, **kwargs))] = edge_id
        return True

    def get_edge_id(self, *args: Any, **kwargs: Any) -> Tensor | None:
        r"""The raw ids of an edge type's edges."""
        key = self.key(self._edge_attr_cls.cast(*args, **kwargs))
        return _read(self._edge_id, key)

    def remove_edge_id(self, *args: Any, **kwargs: Any) -> bool:
        r"""Whether there were any to remove."""
        return self._edge_id.pop(self.key(self._edge_attr_cls.cast(*args, **kwargs)), None) is not None

    # --- what a graph store must have ---------------------------------------------------------------------------

    def _put_edge_index(self, edge_index: Any, edge_attr: EdgeAttr) -> bool:
        self._edge_index[self.key(edge_attr)] = edge_index
        self._edge_attr[self.key(edge_attr)] = edge_attr
        return True

    def _get_edge_index(self, edge_attr: EdgeAttr) -> Any:
        return _read(self._edge_index, self.key(edge_attr))

    def _remove_edge_index(self, edge_attr: EdgeAttr) -> bool:
        self._edge_attr.pop(self.key(edge_attr), None)
        return self._edge_index.pop(self.key(edge_attr), None) is not None

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        r"""What edges there are."""
        return [self._edge_attr[key] for key in self._edge_index]

    # --- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def from_data(
        cls, edge_id: Tensor | None, edge_index: Tensor, num_nodes: int, is_sorted: bool = False
    ) -> Self:
        r"""A store of one part's edges.

        Args:
            edge_id: ``[E]``, the raw id of each edge.
            edge_index: ``[2, E]``, raw ids of nodes. Edges into nodes of other parts may be among them; sampling
                leaves them to the owners of their destinations.
            num_nodes: Of the whole graph.
            is_sorted: Whether edges are sorted by destination; if not, they are sorted here.
        """
        store = cls()
        store.meta = {"is_hetero": False}
        store._put(None, edge_index, edge_id, (num_nodes, num_nodes), is_sorted)
        return store

    @classmethod
    def from_hetero_data(
        cls,
        edge_id_dict: Mapping[EdgeType, Tensor | None] | None,
        edge_index_dict: Mapping[EdgeType, Tensor],
        num_nodes_dict: Mapping[str, int],
        is_sorted: bool = False,
    ) -> Self:
        r"""As :meth:`from_data`, by edge type and node type."""
        store = cls()
        store.meta = {
            "is_hetero": True,
            "node_types": list(num_nodes_dict),
            "edge_types": list(edge_index_dict),
        }
        for edge_type, edge_index in edge_index_dict.items():
            size = (num_nodes_dict[edge_type[0]], num_nodes_dict[edge_type[-1]])
            edge_id = None if edge_id_dict is None else edge_id_dict.get(edge_type)
            store._put(edge_type, edge_index, edge_id, size, is_sorted)
        return store

    @classmethod
    def from_partition(cls, root: str | Path, pid: int) -> Self:
        r"""Opens the edges of one part; they are read when they are first asked for.

        Args:
            root: The partition's folder, or a folder with one partition in it.
            pid: The part.
        """
        return cls.from_share(open_part(root, pid))

    @classmethod
    def from_share(cls, share: GraphData) -> Self:
        r"""The same for a share that was opened already."""
        store = cls()
        store.share, store.meta, store.is_sorted = share, meta_of(share), True
        store.num_partitions, store.partition_idx = share.num_parts, share.part_id
        typed = is_typed(share)
        books = {t: RangeBook(share.offsets(t), _local_finder(share, t)) for t in share.node_types}
        store.node_pb = dict(books) if typed else next(iter(books.values()))
        for edge_type in share.edge_types:
            size = tuple(int(share.offsets(edge_type[end])[-1]) for end in (0, 2))
            attr: dict[str, Any] = {
                "edge_type": edge_type if typed else None,
                "layout": "coo",
                "size": size,
                "is_sorted": True,
            }
            edge_attr = store._edge_attr_cls.cast(**attr)
            key = store.key(edge_attr)
            store._edge_attr[key] = edge_attr
            store._edge_index[key] = _reader(store, share, edge_type, key, 0)
            store._edge_id[key] = _reader(store, share, edge_type, key, 1)
        return store

    def _put(
        self,
        edge_type: EdgeType | None,
        edge_index: Tensor,
        edge_id: Tensor | None,
        size: tuple[int, int],
        is_sorted: bool,
    ) -> None:
        if not is_sorted:
            if edge_id is None:
                edge_index = sort_edge_index(edge_index, sort_by_row=False)
            else:
                edge_index, edge_id = sort_edge_index(edge_index, edge_id, sort_by_row=False)
        attr: dict[str, Any] = {"edge_type": edge_type, "layout": "coo", "size": size, "is_sorted": True}
        self.put_edge_index(edge_index, **attr)
        self.put_edge_id(edge_id, **attr)


def _parts(book: Any, meta: dict[str, Any] | None, ids: Tensor, kind: Any) -> Tensor:
    typed = isinstance(book, Mapping) or bool(meta and meta.get("is_hetero"))
    parts: Tensor = (book[kind] if typed else book)[ids]
    return parts


def _read(kept: dict[Key, Any], key: Key) -> Any:
    value = kept.get(key)
    return value() if callable(value) else value


def _reader(store: LocalGraphStore, share: GraphData, edge_type: EdgeType, key: Key, which: int) -> Callable[[], Tensor]:
    def read() -> Tensor:
        edge_index, edge_id = _by_raw_ids(share, edge_type)
        store._edge_index[key], store._edge_id[key] = edge_index, edge_id
        return (edge_index, edge_id)[which]

    return read


def _by_raw_ids(share: GraphData, edge_type: EdgeType) -> tuple[Tensor, Tensor]:
    """Edges by raw ids of their ends, sorted by destination, and their own raw ids."""
    row, col = share.edge_index(edge_type)
    source, destination = share.node(edge_type[0], "src")["raw_ids"], share.node(edge_type[2])["raw_ids"]
    order = destination[col].argsort(stable=True)
    return torch.stack([source[row], destination[col]])[:, order], share.edge(edge_type)["raw_ids"][order]


def _finder(service: Service, kind: Any) -> Callable[[Tensor], Tensor]:
    return lambda raw_ids: service.ids_of(kind, raw_ids)


def _local_finder(share: GraphData, node_type: str) -> Callable[[Tensor], Tensor]:
    """Finds what a share knows by itself: its owned nodes and its halo."""

    def find(raw_ids: Tensor) -> Tensor:
        sources = share.node(node_type, "src")
        known, order = sources["raw_ids"].sort()
        at = torch.searchsorted(known, raw_ids).clamp_(max=max(known.numel() - 1, 0))
        found = known[at] == raw_ids if known.numel() else torch.zeros_like(raw_ids, dtype=torch.bool)
        if not bool(found.all()):
            raise IdError(
                f"expected raw ids of nodes that part {share.part_id} owns or has as halo, found {int(raw_ids[~found][0])}; "
                f"start the service and attach it to find others"
            )
        ids: Tensor = sources["ids"][order[at]]
        return ids

    return find
