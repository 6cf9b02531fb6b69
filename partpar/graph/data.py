r"""GraphData: the whole graph, or one worker's share of it; how it comes and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from partpar.graph.typed import TypedGraph

if TYPE_CHECKING:
    import networkx
    from torch.distributed import ProcessGroup
    from torch_geometric.data import Data, HeteroData

    from partpar.graph.snapshots import Snapshot
    from partpar.graph.structure import EdgeType
    from partpar.hetero_route import HeteroRoute
    from partpar.route import Route


class GraphData(TypedGraph):
    r"""A graph as frames of node and edge attributes: the whole graph, or a worker's share.

    A share is bipartite: its destinations are the nodes that the worker owns, its sources the owned nodes followed by
    the halo, and its edges every in-edge of an owned node, grouped by destination. A whole graph is its own only part:
    destinations and sources are the same nodes. A homogeneous graph is one with the node type ``"node"`` and the edge
    type ``("node", "to", "node")``; wherever a graph has one type, the argument ``type`` may be left out.

    Make one by :meth:`from_pyg_data`, :meth:`from_networkx`, :meth:`from_bipartite`, :meth:`open` or
    :meth:`load_partition` rather than by calling the class.
    """

    # --- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def from_pyg_data(cls, data: Data | HeteroData) -> GraphData:
        r"""Takes a PyG graph; nothing is dropped silently.

        Args:
            data: What PyG calls a node or edge attribute (:meth:`~torch_geometric.data.Data.is_node_attr`) becomes one
                here; everything else goes to :meth:`meta`, and a warning names the tensors of several rows among it.

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
        edge_weight: str | Mapping[EdgeType, float | str] | None = None,
        algorithm: str = "metis",
        partition_kwargs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        time_attr: str | None = None,
        num_snapshots: int | None = None,
        boundaries: Sequence[float] | None = None,
    ) -> Path:
        r"""Cuts the graph into shares and writes them to ``root/{algorithm}_{num_parts}``.

        Args:
            root: Folder of the partitions of this graph.
            num_parts: Number of parts, one for each worker.
            node_weight: What to balance over the parts: the name of a node attribute (number or bool, ``[num_nodes]``),
                ``"#nodes"`` or ``"#in_edges"``; several make several constraints. Of a typed graph, ``"NAME:TYPE"`` is
                the nodes of that type alone, and ``"NAME:*"`` makes a constraint for each type that has it:
                ``["#nodes:*", "train_mask:*"]`` spreads every node type and every labelled set evenly, but for those
                of fewer than 100 nodes, which the report names.
            edge_weight: Name of an edge attribute that says what cutting an edge costs; or for each edge type a number
                that all its edges weigh, or such a name. An edge without a weight weighs 1.
            algorithm: ``"metis"``, ``"multi-constraint-metis"``, ``"ldg"`` (or ``"lgd"``), ``"random"``, or
                ``"given"`` with ``partition_kwargs={"assignment": part of each node}``.
            partition_kwargs: Further arguments of the algorithm, among them ``seed``.
            overwrite: Replace a partition that stands there and was made from another input or by other arguments.
            time_attr: Name of an edge attribute ``[E]`` that is the time of an edge: shares then have :meth:`snapshots`.
            num_snapshots: Into how many windows of equal length the time from first to last edge is divided.
            boundaries: Or where the windows lie: rising numbers, one more than windows. Edges outside are in no snapshot.

        Returns:
            The partition's folder. If it holds this very partition already, nothing is done.

        Raises:
            PartitionExistsError: Another partition stands there and ``overwrite`` is false.
            PartitionError: Arguments do not fit.
            GraphError: The graph is not valid.
        """
        from partpar.partition import partition_graph

        return partition_graph(
            self,
            root,
            num_parts,
            node_weight,
            edge_weight,
            algorithm,
            dict(partition_kwargs or {}),
            overwrite,
            time_attr,
            num_snapshots,
            boundaries,
        )

    @overload
    def to_route(self, group: ProcessGroup | None = None, *, node_type: str) -> Route: ...

    @overload
    def to_route(self, group: ProcessGroup | None = None, node_type: None = None) -> Any: ...

    def to_route(
        self, group: ProcessGroup | None = None, node_type: str | None = None
    ) -> Route | HeteroRoute:
        r"""The plan that carries rows between the owners and the halos of all shares (collective).

        Args:
            group: Process group with one rank for each part; by default all processes.
            node_type: Whose rows; by default those of all types.

        Returns:
            A :class:`~partpar.Route` for one type; a :class:`~partpar.HeteroRoute` for all types of a typed share.

        Raises:
            AgreementError: A rank holds another part than that of its number in the group, or shares are of several
                partitions; on every rank.
        """
        if node_type is None and len(self._nodes) > 1:
            from partpar.graph.select import mark, sources_of
            from partpar.hetero_route import HeteroRoute

            relations = {}
            for edge_type in self.edge_types:
                num_src = self._sources[edge_type[0]].num_rows
                needed = torch.zeros(num_src, dtype=torch.bool, device=self.device)
                mark(needed, sources_of(self._structure[edge_type]))
                relations[edge_type] = needed
            return HeteroRoute({t: self._route_of(t, group) for t in self.node_types}, relations)
        return self._route_of(self._node_type(node_type), group)

    def _route_of(self, name: str, group: ProcessGroup | None) -> Route:
        from partpar.route import Route

        dst, src = self._nodes[name], self._sources[name]
        if self._part is not None:
            offsets = self._part.offsets[name]
            halo_ids = src["ids"][self.num_owned(name) :]
            digest = int(self._part.run_id[:15] or "0", 16)
            route = Route.from_offsets(
                src["raw_ids"].cpu(), halo_ids.cpu(), offsets, group, self.part_id, run_id=digest
            )
            return route.to(self.device)
        if dst is src:
            raw_ids = dst["raw_ids"] if "raw_ids" in dst else torch.arange(dst.num_rows)
            return Route.from_raw_ids(raw_ids.cpu(), raw_ids.cpu(), group).to(self.device)
        return Route.from_raw_ids(src["raw_ids"].cpu(), dst["raw_ids"].cpu(), group).to(self.device)

    def edge_type_subgraph(self, edge_types: list[EdgeType]) -> GraphData:
        r"""The graph of some edge types alone. A share's halo shrinks to what they need, so that rows travel only to
        where one of these relations needs them; all node types stay.

        Args:
            edge_types: Those to keep.
        """
        from partpar.graph.select import edge_type_subgraph

        return edge_type_subgraph(self, edge_types)

    def snapshots(self, group: ProcessGroup | None = None) -> list[Snapshot]:
        r"""The windows of time of a share that was cut with :obj:`time_attr`, each with its edges, the halo that these
        need and a route (collective).

        Args:
            group: As for :meth:`to_route`.

        Raises:
            GraphError: The partition has no windows.
        """
        from partpar.graph.snapshots import snapshots

        return snapshots(self, group)

    def validate(self, allow_nan: bool = False, num_classes: int | None = None) -> None:
        r"""Raises :class:`~partpar.errors.GraphError` that counts what is wrong and names the first offender.

        Args:
            allow_nan: Accept NaN and infinity in floating attributes.
            num_classes: Labels ``y`` must then be one integer a node, -1 (none) or below it; by default any but other
                negatives.
        """
        from partpar.graph.validate import validate

        validate(self, allow_nan, num_classes)

    def to_pyg_data(self) -> Data | HeteroData:
        r"""Back to PyG: :class:`~torch_geometric.data.Data` for a homogeneous graph, else ``HeteroData``. A share keeps
        its bipartite edge index, and its attributes are those of the owned nodes."""
        from partpar.graph.interop import to_pyg_data

        return to_pyg_data(self)
