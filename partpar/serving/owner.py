r"""What a part answers from its share, and the names of its verbs.

Every message may come from a stranger: types and names are looked up, ids are checked, before anything is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partpar.errors import GraphError, IdError, ServiceError
from partpar.graph import EdgeType, Frame, GraphData
from partpar.kernels.table import fetch_rows, put_rows, words
from partpar.serving.cache import RowCache
from partpar.serving.hop import answer_hop, forget_attribute
from partpar.serving.later import MadeOnce, later
from partpar.serving.messages import HopReply, HopRequest
from partpar.serving.transport import MAX_BYTES, Tensors, Values, Verbs, below

Type = str | EdgeType
_DRAW_BYTES = 4 * 8  # of a neighbour in an answer


def frame_of(share: GraphData, kind: str | Sequence[str]) -> Frame:
    r"""The owned nodes of a node type, or the edges of an edge type."""
    return share.node(kind) if isinstance(kind, str) else share.edge(tuple(kind))  # type: ignore[arg-type]


def column_of(share: GraphData, kind: str | Sequence[str], name: str) -> Tensor:
    r"""An attribute of the rows that a share owns; raises :class:`~partpar.errors.GraphError` where there is none."""
    frame = frame_of(share, kind)
    if name in ("ids", "raw_ids") and name not in frame:  # a graph that was never cut has no others than its rows
        return torch.arange(frame.num_rows)
    if name not in frame:
        raise GraphError(f"{frame.what}: expected an attribute of {sorted(frame)}, found {name!r}")
    return frame[name].contiguous()


def take(table: Tensor, rows: Tensor, out: Tensor | None = None, places: Tensor | None = None) -> Tensor:
    r"""``out[places[i]] = table[rows[i]]``, the compiled way; raises :class:`~partpar.errors.IdError` for a row that
    is not there."""
    if out is None:
        out = table.new_empty((rows.numel(), *table.shape[1:]))
    if rows.numel() == 0 or table.shape[1:].numel() == 0:
        return out
    at = np.arange(rows.numel()) if places is None else places.numpy()
    wrong = fetch_rows(words(table), rows.numpy(), words(out), at) if table.size(0) else 0
    if wrong >= 0:
        raise IdError(f"expected rows from 0 to {table.size(0) - 1}, found {int(rows[wrong])} at position {wrong}")
    return out


class Owner:
    r"""The answers of one part.

    Args:
        share: What it owns.
        cache: What it keeps of other parts, to be told when their rows change.
    """

    def __init__(self, share: GraphData, cache: RowCache) -> None:
        self.share, self.cache = share, cache
        self.fetch_rows: Callable[[str, str, Tensor], Tensor] | None = None  # brings node rows from their owners
        self._times = MadeOnce(self._bring_times)
        self.verbs = Verbs()
        for name in ("ping", "describe", "sample", "fetch", "put", "forget"):
            self.verbs.register(name, getattr(self, name))

    def ping(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Nothing, in return for nothing."""
        return {}

    def describe(self, tensors: Tensors, values: Values) -> Tensors:
        r"""How many edges of each type the share has."""
        return {"num_edges": torch.tensor([self.share.num_edges(t) for t in self.share.edge_types])}

    def sample(self, tensors: Tensors, values: Values) -> Tensors:
        r"""One hop for several edge types: requests ``k`` lie in ``k/...`` and ``values[k]``."""
        requests = {}
        for key, plain in values.items():
            requests[key] = HopRequest.from_wire(below(tensors, key), plain)
        if any(self._needs_times(r) and self._times.get(_times_key(r)) is None for r in requests.values()):
            return later()
        out: Tensors = {}
        left = MAX_BYTES // _DRAW_BYTES
        for key, request in requests.items():
            drawn = answer_hop(self.share, request, left)
            left -= drawn.ids.numel()
            out.update({f"{key}/{name}": tensor for name, tensor in drawn.to_wire()[0].items()})
        return out

    def hop(self, request: HopRequest) -> HopReply:
        r"""One hop for this part's own asking."""
        if self._needs_times(request):
            self._times.wait(_times_key(request))
        return answer_hop(self.share, request)

    def close(self, timeout: float) -> None:
        r"""Waits for what is being brought."""
        self._times.close(timeout)

    def _needs_times(self, request: HopRequest) -> bool:
        """Whether a hop looks at the times of nodes of the halo that are not here yet."""
        name, edge_type = request.time_attr, request.edge_type
        if name is None or edge_type not in self.share.edge_types or name in self.share.edge(edge_type):
            return False
        owned, sources = (self.share.node(edge_type[0], side) for side in ("dst", "src"))
        return name in owned and name not in sources

    def _bring_times(self, key: tuple[str, str]) -> bool:
        """Brings the halo's times from their owners."""
        node_type, name = key
        assert self.fetch_rows is not None
        owned, sources = self.share.node(node_type), self.share.node(node_type, "src")
        halo = self.fetch_rows(node_type, name, sources["ids"][owned.num_rows :])
        sources[name] = torch.cat([owned[name], halo])
        return True

    def fetch(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Rows of attributes: ``values["wanted"][k]`` is ``[type, names]``, ``tensors["k"]`` the rows."""
        out: Tensors = {}
        size = 0
        for k, (kind, names) in enumerate(values["wanted"]):
            rows = _rows(tensors, str(k))
            for name in names:
                column = column_of(self.share, kind, name)
                size += rows.numel() * column.shape[1:].numel() * column.element_size()
                if size > MAX_BYTES:
                    raise ServiceError(f"expected rows of at most {MAX_BYTES} bytes in an answer, found more; ask for fewer")
                out[f"{k}/{name}"] = take(column, rows)
        return out

    def put(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Writes ``tensors["values"]`` to the rows ``tensors["rows"]`` of an attribute; of equal rows the last one
        stays."""
        table = column_of(self.share, values["type"], values["name"])
        rows, new = _rows(tensors, "rows"), tensors["values"].contiguous()
        if new.dtype != table.dtype or new.shape != (rows.numel(), *table.shape[1:]):
            raise GraphError(
                f"attribute {values['name']!r}: expected {table.dtype} of shape {[rows.numel(), *table.shape[1:]]}, "
                f"found {new.dtype} of shape {list(new.shape)}"
            )
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < table.size(0):
            raise IdError(f"expected rows from 0 to {table.size(0) - 1}, found {int(rows.min())} to {int(rows.max())}")
        if new.numel():
            put_rows(words(table), rows.numpy(), words(new), np.arange(rows.numel()))
        frame_of(self.share, values["type"])[values["name"]] = table
        return self.forget(tensors, values)

    def forget(self, tensors: Tensors, values: Values) -> Tensors:
        r"""An attribute changes somewhere: nothing that was kept of it holds."""
        if isinstance(values["type"], str):
            self.cache.forget(values["type"], values["name"])
        forget_attribute(self.share, values["name"])
        return {}


def _times_key(request: HopRequest) -> tuple[str, str | None]:
    return request.edge_type[0], request.time_attr


def _rows(tensors: dict[str, Tensor], name: str) -> Tensor:
    rows: Any = tensors.get(name)
    if rows is None or rows.dtype != torch.int64 or rows.dim() != 1:
        raise IdError(f"{name}: expected int64 rows of shape [n], found {None if rows is None else rows.dtype}")
    return rows.contiguous()
