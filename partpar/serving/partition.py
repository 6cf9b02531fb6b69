r"""Finding the partition that a store is to be read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from partpar.errors import MissingPartitionError
from partpar.graph import EDGE, NODE, EdgeType, GraphData
from partpar.partition.layout import MANIFEST
from partpar.partition.load import open_share
from partpar.partition.manifest import read_manifest
from partpar.serving.owner import Type

Group = None | str | tuple[Any, ...]


def find_partition(root: str | Path) -> Path:
    r"""The folder of the partition in :obj:`root`, which may be that folder itself.

    Raises:
        MissingPartitionError: There is none, or more than one.
    """
    root = Path(root)
    if (root / MANIFEST).is_file():
        return root
    found = sorted(p.parent for p in root.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise MissingPartitionError(
            f"{root}: expected one partition, found {names}; name the folder of the one that is meant"
        )
    return found[0]


def open_part(root: str | Path, part_id: int) -> GraphData:
    r"""The share of a part of the partition in :obj:`root`."""
    folder = find_partition(root)
    manifest = read_manifest(folder)
    if not 0 <= part_id < manifest.num_parts:
        raise MissingPartitionError(
            f"{folder}: expected a part from 0 to {manifest.num_parts - 1}, found {part_id}"
        )
    return open_share(folder, manifest, part_id)


def is_typed(share: GraphData) -> bool:
    r"""Whether a share has types of its own, rather than the only ones of a homogeneous graph."""
    return share.node_types != [NODE] or share.edge_types != [EDGE]


def group_of(share: GraphData, kind: Type) -> Group:
    r"""What PyG's stores call a type: :obj:`None` and ``(None, None)`` in a homogeneous graph."""
    if is_typed(share):
        return kind
    return None if isinstance(kind, str) else (None, None)


def kind_of(share: GraphData, group: Group, is_node: bool) -> Type:
    r"""Back from :func:`group_of`."""
    if is_typed(share):
        assert group is not None
        return group
    return NODE if is_node else EDGE


def meta_of(share: GraphData) -> dict[str, Any]:
    r"""What ``META.json`` of ``torch_geometric.distributed`` says."""
    typed = is_typed(share)
    edge_types: list[EdgeType] | None = share.edge_types if typed else None
    return {
        "num_parts": share.num_parts,
        "is_hetero": typed,
        "node_types": share.node_types if typed else None,
        "edge_types": edge_types,
        "is_sorted": True,
    }
