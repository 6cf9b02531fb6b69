r"""Partitions by the names of ``torch_geometric.distributed.partition``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_geometric.data import Data, HeteroData

from partpar.errors import MissingPartitionError, PartitionError
from partpar.graph import GraphData
from partpar.serving.file_book import edge_books, node_books
from partpar.serving.partition import find_partition, is_typed, meta_of, open_part


class Partitioner:
    r"""Cuts a graph into shares, as :meth:`partpar.GraphData.partition_graph` does; not into the files of the original.

    Args:
        data: The graph. Directed graphs, labels, masks and times are kept as they are.
        num_parts: Number of parts, at least 2.
        root: Folder of the partition.
        recursive: Cut by recursive bisection.
        overwrite: Replace another partition that stands there.
    """

    def __init__(
        self, data: Data | HeteroData, num_parts: int, root: str | Path, recursive: bool = False, overwrite: bool = False
    ) -> None:
        if num_parts < 2:
            raise PartitionError(f"Partitioner: expected at least 2 parts, found {num_parts}")
        self.data, self.num_parts, self.root = data, num_parts, root
        self.recursive, self.overwrite = recursive, overwrite

    @property
    def is_hetero(self) -> bool:
        r"""Whether the graph has types."""
        return isinstance(self.data, HeteroData)

    @property
    def is_node_level_time(self) -> bool:
        r"""Whether nodes have a ``time``."""
        if self.is_hetero:
            return any("time" in store for store in self.data.node_stores)
        return "time" in self.data and bool(self.data.is_node_attr("time"))

    @property
    def is_edge_level_time(self) -> bool:
        r"""Whether edges have a ``time`` or an ``edge_time``."""
        if self.is_hetero:
            return any("time" in store or "edge_time" in store for store in self.data.edge_stores)
        return "edge_time" in self.data or ("time" in self.data and bool(self.data.is_edge_attr("time")))

    @property
    def node_types(self) -> list[str] | None:
        return self.data.node_types if self.is_hetero else None

    @property
    def edge_types(self) -> list[Any] | None:
        return self.data.edge_types if self.is_hetero else None

    def generate_partition(self) -> None:
        r"""Writes the shares; nothing, if this very partition stands there."""
        GraphData.from_pyg_data(self.data).partition_graph(
            self.root,
            self.num_parts,
            partition_kwargs={"recursive": True} if self.recursive else None,
            overwrite=self.overwrite,
        )


def load_partition_info(root_dir: str | Path, partition_idx: int) -> tuple[dict[str, Any], int, int, Any, Any]:
    r"""What there is to know of a partition.

    Returns:
        ``(meta, num_partitions, partition_idx, node_pb, edge_pb)``. The books say which part owns a raw id, as tensors
        would, by type where there are types; they are read from the shares when they are first asked.
    """
    folder = find_partition(root_dir)
    share = open_part(folder, partition_idx)
    if not 0 <= partition_idx < share.num_parts:
        raise MissingPartitionError(f"{folder}: expected a part below {share.num_parts}, found {partition_idx}")
    nodes, edges = node_books(folder, share), edge_books(folder, share)
    if is_typed(share):
        return meta_of(share), share.num_parts, partition_idx, nodes, edges
    return meta_of(share), share.num_parts, partition_idx, next(iter(nodes.values())), next(iter(edges.values()))
