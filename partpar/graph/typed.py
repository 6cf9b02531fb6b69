r"""What is in a graph: frames over node and edge types, and the edges themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from partpar.errors import GraphError
from partpar.graph.frame import Frame
from partpar.graph.structure import CSC, EdgeType, Part

if TYPE_CHECKING:
    from partpar.kernels.adjacency import Adjacency

_SIDES = ("dst", "src")


class TypedGraph:
    r"""Frames and edges of a graph; :class:`~partpar.GraphData` adds how they come and where they go.

    Args:
        nodes: The owned nodes (destinations) of each node type.
        edges: The edges of each edge type, in the order of their structure.
        structure: ``edge_index`` in any order, or a share's :class:`CSC`.
        meta: What is neither node- nor edge-shaped.
        sources: The owned nodes, then the halo; :obj:`None` where these are the nodes themselves.
        part: Which share this is; :obj:`None` for a whole graph.
    """

    def __init__(
        self,
        nodes: Mapping[str, Frame],
        edges: Mapping[EdgeType, Frame],
        structure: Mapping[EdgeType, Tensor | CSC],
        meta: Mapping[str, Any] | None = None,
        sources: Mapping[str, Frame] | None = None,
        part: Part | None = None,
    ) -> None:
        for name in nodes:
            if name in _SIDES:
                raise GraphError(
                    f"expected node types other than 'dst' and 'src', which name sides, found {name!r}; rename it"
                )
        for edge_type in edges:
            missing = {edge_type[0], edge_type[2]} - set(nodes)
            if missing:
                raise GraphError(
                    f"edge type {edge_type}: expected its node types among {list(nodes)}, found {sorted(missing)}"
                )
        self._nodes, self._edges, self._meta = dict(nodes), dict(edges), dict(meta or {})
        self._sources = self._nodes if sources is None else dict(sources)
        self._structure, self._part = dict(structure), part
        self._edge_index: dict[EdgeType, Tensor] = {}
        self._adjacencies: dict[EdgeType, Adjacency] = {}
        self._streams: dict[EdgeType, np.ndarray] = {}

    @property
    def node_types(self) -> list[str]:
        return list(self._nodes)

    @property
    def edge_types(self) -> list[EdgeType]:
        return list(self._edges)

    @property
    def part(self) -> Part | None:
        r"""Which share of which partition this is; :obj:`None` for a whole graph or one made by hand."""
        return self._part

    @property
    def part_id(self) -> int:
        return 0 if self._part is None else self._part.part_id

    @property
    def num_parts(self) -> int:
        return 1 if self._part is None else self._part.num_parts

    @property
    def device(self) -> torch.device:
        for piece in self._structure.values():
            return piece.indptr.device if isinstance(piece, CSC) else piece.device
        return torch.device("cpu")

    def node(self, type: str | None = None, side: str = "dst") -> Frame:
        r"""The attributes of the nodes of one type.

        Args:
            type: The node type. ``node("dst")`` and ``node("src")`` name sides where there is one type.
            side: ``"dst"``, the owned nodes, or ``"src"``, the owned nodes followed by the halo.
        """
        if type in _SIDES and type not in self._nodes:
            if len(self._nodes) > 1:
                raise GraphError(
                    f"node({type!r}): this graph has several types, so a side alone says too little: name one of "
                    f"{self.node_types}, as in node({self.node_types[0]!r}, {type!r})"
                )
            type, side = None, type  # type: ignore[assignment]
        if side not in _SIDES:
            raise GraphError(f"expected side 'dst' (owned) or 'src' (owned, then halo), found {side!r}")
        return (self._nodes if side == "dst" else self._sources)[self._node_type(type)]

    def edge(self, type: EdgeType | None = None) -> Frame:
        r"""The attributes of the edges of one type, in the order of :meth:`edge_index`."""
        return self._edges[self._edge_type(type)]

    def meta(self) -> dict[str, Any]:
        r"""What is neither node- nor edge-shaped."""
        return self._meta

    def num_nodes(self, type: str | None = None) -> int:
        r"""Number of owned nodes (destinations)."""
        return self._nodes[self._node_type(type)].num_rows

    num_owned = num_nodes

    def num_halo(self, type: str | None = None) -> int:
        name = self._node_type(type)
        return self._sources[name].num_rows - self._nodes[name].num_rows

    def num_edges(self, type: EdgeType | None = None) -> int:
        return self._edges[self._edge_type(type)].num_rows

    def offsets(self, type: str | None = None) -> Tensor:
        r"""``[num_parts + 1]`` int64: part p owns ids ``offsets[p]`` to ``offsets[p + 1] - 1``."""
        name = self._node_type(type)
        return (
            torch.tensor([0, self._nodes[name].num_rows]) if self._part is None else self._part.offsets[name]
        )

    def edge_index(self, type: EdgeType | None = None) -> Tensor:
        r"""``[2, E]`` int64: row 0 indexes sources, row 1 destinations. Made once and kept."""
        name = self._edge_type(type)
        piece = self._structure[name]
        if isinstance(piece, Tensor):
            return piece
        if name not in self._edge_index:
            self._edge_index[name] = piece.edge_index()
        return self._edge_index[name]

    def stream(self, type: EdgeType | None = None) -> np.ndarray:
        r"""The edge index as an array to be read from front to back: for a graph that was opened from a folder, a
        read-only memory map whose pages can be given back as one goes."""
        name = self._edge_type(type)
        return self._streams[name] if name in self._streams else self.edge_index(name).numpy()

    def csc(self, type: EdgeType | None = None) -> tuple[Tensor, Tensor]:
        r"""``(indptr [num_dst + 1] int64, indices [E])``: sources grouped by destination. Only a share's edges, and a
        whole graph's whose edges are sorted by destination, stand in this order."""
        name = self._edge_type(type)
        piece = self._structure[name]
        if isinstance(piece, CSC):
            return piece.indptr, piece.indices
        num_dst = self._nodes[name[2]].num_rows
        if piece.size(1) > 1 and bool((piece[1, 1:] < piece[1, :-1]).any()):
            raise GraphError(
                "expected edges sorted by destination, found another order; cut the graph by partition_graph first"
            )
        counts = torch.bincount(piece[1], minlength=num_dst)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), piece[0]

    def adj(self, type: EdgeType | None = None) -> Adjacency:
        r"""The edges in the form that fast kernels read, with all that derives from it (the transpose, the split into
        owned and halo sources): made once and shared by all layers. Layers and models take it for ``edge_index``."""
        # Here, for it loads the compiler: 130 MB that a program which reads no edges is spared.
        from partpar.kernels.adjacency import Adjacency

        name = self._edge_type(type)
        if name not in self._adjacencies:
            piece = self._structure[name]
            num_src, num_dst = self._sources[name[0]].num_rows, self._nodes[name[2]].num_rows
            self._adjacencies[name] = (
                Adjacency(piece.indptr, piece.indices, num_src, num_dst, check=False)
                if isinstance(piece, CSC)
                else Adjacency.from_edge_index(piece, num_src, num_dst)
            )
        return self._adjacencies[name]

    def collect(self, name: str) -> dict[str, Tensor]:
        r"""One attribute of the owned nodes of every type that has it, such as ``collect("x")``.

        Raises:
            GraphError: No type has it.
        """
        found = {t: frame[name] for t, frame in self._nodes.items() if name in frame}
        if not found:
            known = {t: list(frame) for t, frame in self._nodes.items()}
            raise GraphError(f"collect: expected an attribute that some node type has ({known}), found {name!r}")
        return found

    def edge_index_dict(self) -> dict[EdgeType, Tensor]:
        r""":meth:`edge_index` of every edge type."""
        return {t: self.edge_index(t) for t in self._edges}

    def adj_dict(self) -> dict[EdgeType, Adjacency]:
        r""":meth:`adj` of every edge type."""
        return {t: self.adj(t) for t in self._edges}

    def to(self, device: torch.device | str) -> Self:
        r"""The same graph on another device; an attribute is moved when it is first read."""
        whole = self._sources is self._nodes
        return type(self)(
            {t: f.to(device) for t, f in self._nodes.items()},
            {t: f.to(device) for t, f in self._edges.items()},
            {t: piece.to(device) for t, piece in self._structure.items()},
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._meta.items()},
            None if whole else {t: f.to(device) for t, f in self._sources.items()},
            self._part,
        )

    def __repr__(self) -> str:
        kind = "GraphData" if self._part is None else f"GraphData(share {self.part_id} of {self.num_parts})"
        nodes = ", ".join(f"{t}: {f.num_rows} nodes {list(f)}" for t, f in self._nodes.items())
        edges = ", ".join(f"{'-'.join(t)}: {f.num_rows} edges {list(f)}" for t, f in self._edges.items())
        meta = f"; meta {list(self._meta)}" if self._meta else ""
        return f"{kind}[{nodes}; {edges}{meta}]"

    def _node_type(self, type: str | None) -> str:
        if type is None and len(self._nodes) == 1:
            return next(iter(self._nodes))
        if type not in self._nodes:
            raise GraphError(f"expected a node type of {self.node_types}, found {type!r}{_several(self._nodes)}")
        return type

    def _edge_type(self, type: EdgeType | None) -> EdgeType:
        if type is None and len(self._edges) == 1:
            return next(iter(self._edges))
        if type not in self._edges:
            raise GraphError(f"expected an edge type of {self.edge_types}, found {type!r}{_several(self._edges)}")
        return type


def _several(types: Collection[Any]) -> str:
    """Why the type may not be left out."""
    return "; this graph has several types: name one of them" if len(types) > 1 else ""
