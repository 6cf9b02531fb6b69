r"""GraphData: the whole graph, or one worker's share of it, as frames over node types and edge types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.graph.frame import Frame

if TYPE_CHECKING:
    import networkx
    from torch.distributed import ProcessGroup
    from torch_geometric.data import Data, HeteroData

    from partpar.route import Route

EdgeType: TypeAlias = tuple[str, str, str]

NODE: str = "node"
EDGE: EdgeType = (NODE, "to", NODE)
_SIDES = ("dst", "src")


@dataclass(frozen=True)
class CSC:
    r"""Edges grouped by destination: those into ``i`` come from ``indices[indptr[i]:indptr[i + 1]]``."""

    indptr: Tensor
    indices: Tensor

    def edge_index(self) -> Tensor:
        degree = self.indptr.diff()
        dst = torch.repeat_interleave(torch.arange(degree.numel(), device=degree.device), degree)
        return torch.stack([self.indices.to(torch.int64), dst])


@dataclass(frozen=True)
class Part:
    r"""Which piece of which partition a share is. Part p owns ids ``offsets[type][p]`` to ``offsets[type][p + 1] - 1``."""

    part_id: int
    num_parts: int
    offsets: Mapping[str, Tensor]
    run_id: str


class GraphData:
    r"""A graph as frames of node and edge attributes: the whole graph, or a worker's share.

    A share is bipartite: its destinations are the nodes that the worker owns, its sources the owned nodes followed by
    the halo, and its edges every in-edge of an owned node, grouped by destination. A whole graph is its own only part:
    destinations and sources are the same nodes. A homogeneous graph is one with the node type ``"node"`` and the edge
    type ``("node", "to", "node")``; wherever a graph has one type, the argument ``type`` may be left out.

    Make one by :meth:`from_pyg_data`, :meth:`from_networkx`, :meth:`from_bipartite`, :meth:`open` or
    :meth:`load_partition` rather than by calling the class.
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
                raise GraphError(f"expected node types other than 'dst' and 'src', which name sides, found {name!r}; rename it")
        for edge_type in edges:
            missing = {edge_type[0], edge_type[2]} - set(nodes)
            if missing:
                raise GraphError(f"edge type {edge_type}: expected its node types among {list(nodes)}, found {sorted(missing)}")
        self._nodes, self._edges, self._meta = dict(nodes), dict(edges), dict(meta or {})
        self._sources = self._nodes if sources is None else dict(sources)
        self._structure, self._part = dict(structure), part
        self._edge_index: dict[EdgeType, Tensor] = {}
        self._streams: dict[EdgeType, np.ndarray] = {}

    # --- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def from_pyg_data(cls, data: Data | HeteroData) -> GraphData:
        r"""Takes a PyG graph; nothing is dropped silently.

        Args:
            data: What PyG calls a node or edge attribute (:meth:`~torch_geometric.data.Data.is_node_attr`) becomes one
                here; everything else goes to :meth:`meta`.

        Raises:
            GraphError: An attribute is neither a tensor nor a plain value; the message names it.
        """
        from partpar.graph.interop import from_pyg_data

        return from_pyg_data(data)

    @classmethod
    def from_networkx(cls, graph: networkx.Graph) -> GraphData:
        r"""Takes a networkx graph through :func:`torch_geometric.utils.from_networkx`: nodes are numbered in the graph's
        order, and an undirected edge becomes two directed ones."""
        from partpar.graph.interop import from_networkx

        return from_networkx(graph)

    @classmethod
    def from_bipartite(
        cls,
        edge_index: Tensor,
        num_src_nodes: int | None = None,
        num_dst_nodes: int | None = None,
        raw_src_ids: Tensor | None = None,
        raw_dst_ids: Tensor | None = None,
    ) -> GraphData:
        r"""Makes a share by hand from edges that the caller has cut already.

        Sources are put in the order that a route delivers: first the destinations, in the order given, whether or not
        they are sources of an edge, then all others by raw id. So ``x[:num_dst_nodes]`` of what
        ``to_route().apply(x)`` returns is ``x`` itself, whatever order :obj:`raw_src_ids` came in. The order given is
        kept where it is such an order already. :obj:`node("src")["input_rows"]` says at which row of
        :obj:`raw_src_ids` a source stood (-1: not there).

        Args:
            edge_index: ``[2, E]`` int64: row 0 into :obj:`raw_src_ids`, row 1 into :obj:`raw_dst_ids`.
            num_src_nodes: Number of sources; by default as :obj:`raw_src_ids` or the largest index says.
            num_dst_nodes: Number of destinations, likewise.
            raw_src_ids: ``[num_src_nodes]`` int64, distinct; by default ``0, 1, …``.
            raw_dst_ids: ``[num_dst_nodes]`` int64, distinct; by default ``0, 1, …``.
        """
        from partpar.graph.bipartite import from_bipartite

        return from_bipartite(edge_index, num_src_nodes, num_dst_nodes, raw_src_ids, raw_dst_ids)

    @classmethod
    def open(cls, folder: str | Path) -> GraphData:
        r"""Opens a graph kept as one memory-mapped ``.npy`` file for each attribute; see :mod:`partpar.graph.arrays`."""
        from partpar.graph.arrays import open_folder

        return open_folder(folder)

    def save(self, folder: str | Path) -> None:
        r"""Writes a whole graph as :meth:`open` reads it."""
        from partpar.graph.arrays import save_folder

        save_folder(self, folder)

    @classmethod
    def load_partition(
        cls,
        root: str | Path,
        part_id: int | None = None,
        num_parts: int | None = None,
        algorithm: str = "metis",
        verify: bool | None = None,
    ) -> GraphData:
        r"""Opens one share of a partition, memory-mapped.

        Args:
            root: The folder given to :meth:`partition_graph`.
            part_id: Which share; by default this process's rank.
            num_parts: Of the partition; by default the world size.
            algorithm: That made it.
            verify: Compare the share's checksum: :obj:`None` at the first open on this machine, :obj:`True` always,
                :obj:`False` never.

        Raises:
            MissingPartitionError: There is no such partition or share; the message names those found.
            PartitionFileError: A file is truncated, changed, of another run or of a newer format.
        """
        from partpar.partition import load_partition

        return load_partition(root, part_id, num_parts, algorithm, verify)

    # --- verbs --------------------------------------------------------------------------------------------------

    def partition_graph(
        self,
        root: str | Path,
        num_parts: int,
        node_weight: str | list[str] | None = None,
        edge_weight: str | None = None,
        algorithm: str = "metis",
        partition_kwargs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Path:
        r"""Cuts the graph into shares and writes them to ``root/{algorithm}_{num_parts}``.

        Args:
            root: Folder of the partitions of this graph.
            num_parts: Number of parts, one for each worker.
            node_weight: What to balance over the parts: the name of a node attribute (number or bool, ``[num_nodes]``),
                ``"#nodes"`` or ``"#in_edges"``; several make several constraints.
            edge_weight: Name of an edge attribute that says what cutting an edge costs.
            algorithm: ``"metis"``, ``"multi-constraint-metis"``, ``"ldg"`` (or ``"lgd"``), ``"random"``, or
                ``"given"`` with ``partition_kwargs={"assignment": part of each node}``.
            partition_kwargs: Further arguments of the algorithm, among them ``seed``.
            overwrite: Replace a partition that stands there and was made from another input or by other arguments.

        Returns:
            The partition's folder. If it holds this very partition already, nothing is done.

        Raises:
            PartitionExistsError: Another partition stands there and ``overwrite`` is false.
            PartitionError: Arguments do not fit.
            GraphError: The graph is not valid.
        """
        from partpar.partition import partition_graph

        return partition_graph(
            self, root, num_parts, node_weight, edge_weight, algorithm, dict(partition_kwargs or {}), overwrite
        )

    def to_route(self, group: ProcessGroup | None = None, node_type: str | None = None) -> Route:
        r"""The plan that carries rows between the owners and the halos of all shares (collective).

        Args:
            group: Process group with one rank for each part; by default all processes.
            node_type: Whose rows; may be left out where there is one type.
        """
        from partpar.route import Route

        name = self._node_type(node_type)
        dst, src = self._nodes[name], self._sources[name]
        if self._part is not None:
            offsets = self._part.offsets[name]
            halo_ids = src["ids"][self.num_owned(name) :]
            digest = int(self._part.run_id[:15] or "0", 16)
            return Route.from_offsets(src["raw_ids"].cpu(), halo_ids.cpu(), offsets, group, run_id=digest).to(self.device)
        if dst is src:
            raw_ids = dst["raw_ids"] if "raw_ids" in dst else torch.arange(dst.num_rows)
            return Route.from_raw_ids(raw_ids.cpu(), raw_ids.cpu(), group).to(self.device)
        return Route.from_raw_ids(src["raw_ids"].cpu(), dst["raw_ids"].cpu(), group).to(self.device)

    def validate(self, allow_nan: bool = False, num_classes: int | None = None) -> None:
        r"""Raises :class:`~partpar.errors.GraphError` that counts what is wrong and names the first offender.

        Args:
            allow_nan: Accept NaN and infinity in floating attributes.
            num_classes: Labels ``y`` (integers) must be -1 (none) or below it; by default any but other negatives.
        """
        from partpar.graph.validate import validate

        validate(self, allow_nan, num_classes)

    def to_pyg_data(self) -> Data | HeteroData:
        r"""Back to PyG: :class:`~torch_geometric.data.Data` for a homogeneous graph, else ``HeteroData``. A share keeps
        its bipartite edge index, and its attributes are those of the owned nodes."""
        from partpar.graph.interop import to_pyg_data

        return to_pyg_data(self)

    # --- access -------------------------------------------------------------------------------------------------

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
        return torch.tensor([0, self._nodes[name].num_rows]) if self._part is None else self._part.offsets[name]

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
            raise GraphError("expected edges sorted by destination, found another order; cut the graph by partition_graph first")
        counts = torch.bincount(piece[1], minlength=num_dst)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), piece[0]

    def to(self, device: torch.device | str) -> GraphData:
        r"""The same graph on another device; an attribute is moved when it is first read."""
        moved: dict[EdgeType, Tensor | CSC] = {}
        for name, piece in self._structure.items():
            csc = isinstance(piece, CSC)
            moved[name] = replace(piece, indptr=piece.indptr.to(device), indices=piece.indices.to(device)) if csc else piece.to(device)
        whole = self._sources is self._nodes
        return GraphData(
            {t: f.to(device) for t, f in self._nodes.items()},
            {t: f.to(device) for t, f in self._edges.items()},
            moved,
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self._meta.items()},
            None if whole else {t: f.to(device) for t, f in self._sources.items()},
            self._part,
        )

    def __repr__(self) -> str:
        kind = "GraphData" if self._part is None else f"GraphData(share {self.part_id} of {self.num_parts})"
        nodes = ", ".join(f"{t}: {f.num_rows} nodes {list(f)}" for t, f in self._nodes.items())
        edges = ", ".join(f"{'-'.join(t)}: {f.num_rows} edges {list(f)}" for t, f in self._edges.items())
        return f"{kind}[{nodes}; {edges}]"

    def _node_type(self, type: str | None) -> str:
        if type is None and len(self._nodes) == 1:
            return next(iter(self._nodes))
        if type not in self._nodes:
            raise GraphError(f"expected a node type of {self.node_types}, found {type!r}")
        return type  # type: ignore[return-value]

    def _edge_type(self, type: EdgeType | None) -> EdgeType:
        if type is None and len(self._edges) == 1:
            return next(iter(self._edges))
        if type not in self._edges:
            raise GraphError(f"expected an edge type of {self.edge_types}, found {type!r}")
        return type  # type: ignore[return-value]
