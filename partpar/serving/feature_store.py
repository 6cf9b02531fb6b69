r"""The rows of one part, behind PyG's :class:`~torch_geometric.data.FeatureStore`, and those of all others."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch_geometric.data import FeatureStore, TensorAttr
from torch_geometric.data.feature_store import _FieldStatus
from typing_extensions import Self

from partpar.errors import GraphError, IdError
from partpar.graph import GraphData
from partpar.serving.book import RangeBook
from partpar.serving.lookup import Lookup, Router
from partpar.serving.owner import Type
from partpar.serving.partition import Group, group_of, is_typed, kind_of, meta_of, open_part
from partpar.serving.service import Service

Book = Tensor | RangeBook


@dataclass
class LocalTensorAttr(TensorAttr):
    r"""An attribute of a group; all of its rows, unless ``index`` says which."""

    def __init__(
        self, group_name: Any = _FieldStatus.UNSET, attr_name: Any = _FieldStatus.UNSET, index: Any = None
    ) -> None:
        super().__init__(group_name, attr_name, index)


class LocalFeatureStore(FeatureStore):
    r"""The rows that one part has, by raw ids: the names of ``torch_geometric.distributed.LocalFeatureStore``.

    Nodes of a homogeneous graph are the group :obj:`None`, its edges ``(None, None)``; features are called ``"x"``
    and ``"edge_attr"``, labels ``"y"``, times ``"time"`` and ``"edge_time"`` by default.

    Attributes:
        num_partitions: Number of parts.
        partition_idx: This part.
        node_feat_pb: Which part has a node's rows: a tensor with an entry for each, or a
            :class:`~partpar.serving.book.RangeBook`; in a heterogeneous graph, one for each node type.
        edge_feat_pb: The same for edges.
        labels: Labels of nodes, if somebody sets them; a share has its own under ``"y"``.
        local_only: Whether rows of other parts are never asked for.
        share: The share it was opened from; :obj:`None` for one made of tensors.
    """

    def __init__(self) -> None:
        super().__init__(tensor_attr_cls=LocalTensorAttr)
        self._feat: dict[tuple[Group, str], Any] = {}
        self._global_id: dict[Group, Any] = {}
        self._sorted: dict[Group, tuple[Tensor, Tensor]] = {}
        self.num_partitions, self.partition_idx = 1, 0
        self.node_feat_pb: Any = None
        self.edge_feat_pb: Any = None
        self.labels: Any = None
        self.local_only = False
        self.rpc_router: Router | None = None
        self.rpc_call_id: int | None = None
        self.meta: dict[str, Any] | None = None
        self.share: GraphData | None = None
        self.service: Service | None = None
        self._lookup: Lookup | None = None

    @staticmethod
    def key(attr: TensorAttr) -> tuple[Group, str]:
        r"""What an attribute is kept under."""
        return (attr.group_name, attr.attr_name)

    # --- ids ----------------------------------------------------------------------------------------------------

    def put_global_id(self, global_id: Tensor, group_name: Group) -> bool:
        r"""Keeps the raw ids of a group's rows, in their order."""
        self._global_id[group_name] = global_id
        self._sorted.pop(group_name, None)
        return True

    def get_global_id(self, group_name: Group) -> Tensor | None:
        r"""The raw ids of a group's rows."""
        value = self._global_id.get(group_name)
        return value() if callable(value) else value

    def remove_global_id(self, group_name: Group) -> bool:
        r"""Whether there were any to remove."""
        self._sorted.pop(group_name, None)
        return self._global_id.pop(group_name, None) is not None

    def rows_of(self, group_name: Group, global_id: Tensor) -> Tensor:
        r"""The rows here of raw ids ``[n]``.

        Raises:
            IdError: One is not here.
        """
        if group_name not in self._sorted:
            ids = self.get_global_id(group_name)
            if ids is None:
                raise GraphError(f"group {group_name!r}: expected put_global_id before a look-up, found no ids")
            known, order = ids.sort()
            self._sorted[group_name] = known, order
        known, order = self._sorted[group_name]
        if known.numel() == 0 and global_id.numel() == 0:
            return global_id
        at = torch.searchsorted(known, global_id).clamp_(max=max(known.numel() - 1, 0))
        found = known[at] == global_id if known.numel() else torch.zeros_like(global_id, dtype=torch.bool)
        if not bool(found.all()):
            raise IdError(
                f"group {group_name!r}: expected ids that part {self.partition_idx} has, "
                f"found {int((~found).sum())} others, the first {int(global_id[~found][0])}"
            )
        return order[at]

    # --- what a feature store must have -------------------------------------------------------------------------

    def _put_tensor(self, tensor: Any, attr: TensorAttr) -> bool:
        if attr.index is not None:  # some rows of what is here
            whole = self._feat.get(self.key(attr))
            if whole is None:
                return False
            (whole() if callable(whole) else whole)[attr.index] = tensor
            return True
        self._feat[self.key(attr)] = tensor
        return True

    def _get_tensor(self, attr: TensorAttr) -> Tensor | None:
        tensor = self._feat.get(self.key(attr))
        tensor = tensor() if callable(tensor) else tensor
        return tensor if tensor is None or attr.index is None else tensor[attr.index]

    def _remove_tensor(self, attr: TensorAttr) -> bool:
        return self._feat.pop(self.key(attr), None) is not None

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        tensor = self._get_tensor(attr)
        return None if tensor is None else tensor.size()

    def get_all_tensor_attrs(self) -> list[LocalTensorAttr]:
        r"""What attributes there are."""
        return [self._tensor_attr_cls.cast(*key) for key in self._feat]

    def get_tensor_from_global_id(self, *args: Any, **kwargs: Any) -> Tensor | None:
        r"""As ``get_tensor``, where ``index`` holds raw ids."""
        attr = copy.copy(self._tensor_attr_cls.cast(*args, **kwargs))
        assert attr.index is not None
        attr.index = self.rows_of(attr.group_name, attr.index)
        return self.get_tensor(attr)

    def has_edge_attr(self) -> bool:
        r"""Whether any edges have features ``"edge_attr"``."""
        return any(name == "edge_attr" for _, name in self._feat)

    # --- rows of all parts --------------------------------------------------------------------------------------

    def attach(self, service: Service) -> None:
        r"""Rows of all parts are looked up through this service from now on."""
        self.service = service

    def set_rpc_router(self, rpc_router: Router | None) -> None:
        r"""Rows of other parts are looked up at the workers that this router names; every rank calls it, in the same
        order of stores."""
        self.rpc_router = rpc_router
        if self.local_only or self.service is not None:
            return
        if rpc_router is None:
            raise ValueError("expected a router, found none; set local_only=True to look up local rows only")
        self._lookup = Lookup(self, rpc_router)
        self.rpc_call_id = self._lookup.number

    def lookup_features(self, index: Tensor, is_node_feat: bool = True, input_type: Any = None) -> Future:
        r"""A future of the feature rows ``[n, *]`` of raw ids ``[n]``, wherever they are, in order.

        Args:
            index: Raw ids of nodes or edges, as often as you like.
            is_node_feat: Rows ``"x"`` of nodes, or ``"edge_attr"`` of edges.
            input_type: In a heterogeneous graph, their type.

        Raises:
            IdError: An id is nobody's.
        """
        group, name = self._which(is_node_feat, input_type)
        future: Future = Future()
        wait = self._begin(index, is_node_feat, group, name)
        if self.service is None and self._lookup is None:
            _finish(future, wait)
        else:  # others may chain on the future, so it is done when the rows are there, awaited or not
            threading.Thread(target=_finish, args=(future, wait), daemon=True).start()
        return future

    def put_features(
        self, index: Tensor, rows: Tensor, is_node_feat: bool = True, input_type: Any = None
    ) -> None:
        r"""Changes the feature rows of raw ids ``[n]``, wherever they are; arguments as of :meth:`lookup_features`."""
        group, name = self._which(is_node_feat, input_type)
        if self.service is not None:
            kind = kind_of(self.service.share, group, is_node_feat)
            self.service.put(kind, name, self.service.ids_of(kind, index), rows)
        elif self._lookup is not None:
            self._lookup.put(index, rows, self._parts(index, is_node_feat, group), group, name)
        else:
            self.put_tensor(rows, group_name=group, attr_name=name, index=self.rows_of(group, index))

    def _begin(self, index: Tensor, is_node_feat: bool, group: Group, name: str) -> Callable[[], Tensor]:
        if self.service is not None:
            kind = kind_of(self.service.share, group, is_node_feat)
            flight = self.service.fetch_begin(kind, [name], self.service.ids_of(kind, index))
            return lambda: flight.wait()[name]
        if self._lookup is not None and not self.local_only:
            return self._lookup.begin(index, self._parts(index, is_node_feat, group), group, name)
        rows = self.get_tensor_from_global_id(group_name=group, attr_name=name, index=index)
        if rows is None:
            raise GraphError(f"group {group!r}: expected features {name!r}, found {list(self._feat)}")
        return lambda: rows

    def _which(self, is_node_feat: bool, input_type: Any) -> tuple[Group, str]:
        typed = bool(self.meta and self.meta.get("is_hetero"))
        group = input_type if typed else None if is_node_feat else (None, None)
        return group, "x" if is_node_feat else "edge_attr"

    def _parts(self, index: Tensor, is_node_feat: bool, group: Group) -> Tensor:
        book = self.node_feat_pb if is_node_feat else self.edge_feat_pb
        parts: Tensor = (book[group] if isinstance(book, Mapping) else book)[index]
        return parts

    # --- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def from_data(
        cls,
        node_id: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        edge_id: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Self:
        r"""A store of one part's rows.

        Args:
            node_id: ``[n]``, the raw ids of its nodes.
            x: ``[n, *]``, their features.
            y: ``[n]``, their labels.
            edge_id: ``[m]``, the raw ids of its edges.
            edge_attr: ``[m, *]``, their features.
        """
        store = cls()
        store.meta = {"is_hetero": False}
        store._put_group(None, node_id, {"x": x, "y": y})
        store._put_group((None, None), edge_id, {"edge_attr": edge_attr})
        return store

    @classmethod
    def from_hetero_data(
        cls,
        node_id_dict: Mapping[str, Tensor],
        x_dict: Mapping[str, Tensor] | None = None,
        y_dict: Mapping[str, Tensor] | None = None,
        edge_id_dict: Mapping[Any, Tensor] | None = None,
        edge_attr_dict: Mapping[Any, Tensor] | None = None,
    ) -> Self:
        r"""As :meth:`from_data`, by node type and edge type."""
        store = cls()
        store.meta = {"is_hetero": True}
        for node_type, node_id in node_id_dict.items():
            store.put_global_id(node_id, group_name=node_type)
        for name, rows in (("x", x_dict), ("y", y_dict)):
            for node_type, value in (rows or {}).items():
                store.put_tensor(value, group_name=node_type, attr_name=name)
        for edge_type in {**(edge_id_dict or {}), **(edge_attr_dict or {})}:
            edge_id, edge_attr = ((d or {}).get(edge_type) for d in (edge_id_dict, edge_attr_dict))
            store._put_group(edge_type, edge_id, {"edge_attr": edge_attr})
        return store

    @classmethod
    def from_partition(cls, root: str | Path, pid: int) -> Self:
        r"""Opens the rows of one part; they stay in the file, memory-mapped, until they are asked for.

        Args:
            root: The partition's folder, or a folder with one partition in it.
            pid: The part.
        """
        return cls.from_share(open_part(root, pid))

    @classmethod
    def from_share(cls, share: GraphData) -> Self:
        r"""The same for a share that was opened already."""
        store = cls()
        store.share, store.meta = share, meta_of(share)
        store.num_partitions, store.partition_idx = share.num_parts, share.part_id
        kinds: list[Type] = [*share.node_types, *share.edge_types]
        for kind in kinds:
            frame = share.node(kind) if isinstance(kind, str) else share.edge(kind)
            group = group_of(share, kind)
            store._global_id[group] = lambda frame=frame: frame["raw_ids"]
            for name in frame:
                if name not in ("ids", "raw_ids"):
                    store._feat[group, name] = lambda frame=frame, name=name: frame[name]
        books = {t: RangeBook(share.offsets(t)) for t in share.node_types}
        store.node_feat_pb = books if is_typed(share) else next(iter(books.values()))
        return store

    def _put_group(self, group: Group, ids: Tensor | None, rows: Mapping[str, Tensor | None]) -> None:
        if ids is not None:
            self.put_global_id(ids, group_name=group)
        for name, value in rows.items():
            if value is None:
                continue
            if ids is None:
                raise ValueError(f"expected 'edge_id' beside {name!r} of {group!r}, found none")
            self.put_tensor(value, group_name=group, attr_name=name)


def _finish(future: Future, wait: Callable[[], Tensor]) -> None:
    try:
        future.set_result(wait())
    except Exception as error:  # noqa: BLE001 - it is raised where the rows are awaited
        future.set_exception(error)
