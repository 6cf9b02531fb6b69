r"""Partitions that ``torch_geometric.distributed.Partitioner`` wrote (PyG 2.3 to 2.8), read without running code of
their own: pickles are opened with ``weights_only`` and a list of what they may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.errors import MissingPartitionError, PartitionFileError
from partpar.graph import EDGE, NODE, EdgeType, Frame, GraphData
from partpar.graph.torch_file import read_saved

Assignment = dict[str, Tensor]


def read_pyg_partition(root: str | Path) -> tuple[GraphData, int, Assignment]:
    r"""The graph that PyG's ``Partitioner`` cut, nodes and edges by the numbers they had, and the part of each node.

    The files keep features ``x``, ``edge_attr`` and times, and nothing else: labels and masks are not in them. A time
    of edges is called ``edge_time``, whatever it was called before.

    Args:
        root: The folder of ``META.json``.

    Returns:
        The graph, the number of parts, and the part of each node, int64 ``[num_nodes]`` for each node type.

    Raises:
        MissingPartitionError: If a file is missing.
        PartitionFileError: If a file is damaged, holds what no partition holds, or they do not fit together.
    """
    root = Path(root)
    meta = _meta(root / "META.json")
    parts = [root / f"part_{part}" for part in range(meta["num_parts"])]
    typed = meta["is_hetero"]
    node_types = meta["node_types"] if typed else [NODE]
    edge_types = [_edge_type(e, root) for e in meta["edge_types"]] if typed else [EDGE]
    maps = {t: _load(root / "node_map" / f"{t}.pt") if typed else _load(root / "node_map.pt") for t in node_types}
    for node_type, parts_of in maps.items():
        _check(isinstance(parts_of, Tensor) and parts_of.dim() == 1, root, f"a part for each node of type {node_type!r}", parts_of)
        within = parts_of.numel() == 0 or 0 <= int(parts_of.min()) <= int(parts_of.max()) < len(parts)
        _check(within, root, f"parts 0 to {len(parts) - 1} of nodes of type {node_type!r}", "others")

    sizes = {t: p.numel() for t, p in maps.items()}
    offsets = dict(zip(node_types, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    nodes = {t: Frame(n, what=f"nodes of type {t!r}") for t, n in sizes.items()}
    graphs = [_by_type(_load(p / "graph.pt"), edge_types, typed, p / "graph.pt") for p in parts]
    structure, order = {}, {}
    begin = 0
    for edge_type in edge_types:
        structure[edge_type], order[edge_type] = _edges([g[edge_type] for g in graphs], edge_type, sizes, begin, root)
        begin += order[edge_type].numel()
    edges = {e: Frame(order[e].numel(), what=f"edges of type {e}") for e in edge_types}
    _node_rows(nodes, [_by_type(_load(p / "node_feats.pt"), node_types, typed, p) for p in parts], offsets, root)
    _edge_rows(edges, order, [_by_type(_load(p / "edge_feats.pt"), edge_types, typed, p, True) for p in parts], root)
    return GraphData(nodes, edges, structure), len(parts), {t: p.long() for t, p in maps.items()}


def _meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingPartitionError(f"{path}: expected the file that PyG's Partitioner writes, found none")
    try:
        meta = json.loads(path.read_bytes())
        num_parts, typed = meta["num_parts"], meta["is_hetero"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartitionFileError(f"{path}: expected JSON with num_parts and is_hetero, found {type(error).__name__}: {error}") from error
    if not isinstance(num_parts, int) or not 1 <= num_parts <= 1 << 20:
        raise PartitionFileError(f"{path}: expected num_parts of at least 1, found {num_parts!r}")
    names = [*(meta.get("node_types") or []), *(s for e in meta.get("edge_types") or [] for s in e)]
    if typed and not (names and all(isinstance(n, str) and Path(n).name == n for n in names)):
        raise PartitionFileError(f"{path}: expected names of node and edge types, found {names[:8]}")
    return dict(meta)


def _edge_type(raw: Any, root: Path) -> EdgeType:
    _check(isinstance(raw, list) and len(raw) == 3, root, "an edge type of three names", raw)
    return str(raw[0]), str(raw[1]), str(raw[2])


def _load(path: Path) -> Any:
    if not path.is_file():
        raise MissingPartitionError(f"{path}: expected a file of the partition, found none; copy it here")
    with _only((_plain_dict, "collections.defaultdict"), dict):
        return read_saved(path, PartitionFileError, "tensors and plain values")


@contextmanager
def _only(*allowed: Any) -> Iterator[None]:
    r"""Allows these besides what torch itself does, and none of what other libraries have allowed for all."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(allowed))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _plain_dict(*factory: Any) -> dict[Any, Any]:
    r"""What stands for the ``defaultdict`` in which PyG keeps features of edges: torch fills plain dictionaries only."""
    return {}


def _by_type(raw: Any, types: list[Any], typed: bool, path: Path, may_lack: bool = False) -> dict[Any, dict[str, Any]]:
    _check(isinstance(raw, dict), path, "a dictionary", raw)
    pieces = {t: raw.get(t, {} if may_lack else None) for t in types} if typed else {types[0]: raw}
    for name, piece in pieces.items():
        _check(isinstance(piece, dict), path, f"a dictionary for type {name}", piece)
    return pieces


def _edges(pieces: list[dict[str, Any]], edge_type: EdgeType, sizes: dict[str, int], begin: int, root: Path) -> tuple[Tensor, Tensor]:
    r"""Edges by raw id, and the raw ids in the order of the files."""
    for piece in pieces:
        lengths = [piece[k].numel() if isinstance(piece.get(k), Tensor) else -1 for k in ("row", "col", "edge_id")]
        _check(len(set(lengths)) == 1 and lengths[0] >= 0, root, f"row, col and edge_id of one length for {edge_type}", lengths)
    ends = torch.stack([torch.cat([p["row"] for p in pieces]), torch.cat([p["col"] for p in pieces])]).long()
    ids = torch.cat([p["edge_id"] for p in pieces]).long()
    # Of a graph with types, they count through all types.
    if ids.numel() and int(ids.min()) == begin:
        ids = ids - begin
    _check(torch.equal(ids.sort().values, torch.arange(ids.numel())), root, f"each edge of {edge_type} in one part", "some twice or not at all")
    for row, node_type in zip(ends, (edge_type[0], edge_type[2]), strict=True):
        within = row.numel() == 0 or 0 <= int(row.min()) <= int(row.max()) < sizes[node_type]
        _check(within, root, f"ends of {edge_type} below {sizes[node_type]}", "others")
    out = torch.empty_like(ends)
    out[:, ids] = ends
    return out, ids


def _node_rows(nodes: dict[str, Frame], parts: list[dict[str, Any]], offsets: dict[str, int], root: Path) -> None:
    for node_type, frame in nodes.items():
        pieces = [part[node_type] for part in parts]
        ids = torch.cat([p["id"] if "id" in p else p["global_id"] - offsets[node_type] for p in pieces])
        _check(torch.equal(ids.sort().values, torch.arange(frame.num_rows)), root, f"each node of type {node_type!r} in one part", "some twice or not at all")
        for name in pieces[0].get("feats", {}):
            _scatter(frame, name, [p["feats"].get(name) for p in pieces], ids, root)
        time = pieces[0].get("time")
        if isinstance(time, Tensor):  # of all nodes, in every part
            _check(time.size(0) == frame.num_rows, root, f"{frame.num_rows} times of nodes", time.size(0))
            frame["time"] = time


def _edge_rows(edges: dict[EdgeType, Frame], order: dict[EdgeType, Tensor], parts: list[dict[EdgeType, Any]], root: Path) -> None:
    for edge_type, frame in edges.items():
        pieces = [part[edge_type] for part in parts]
        for name in dict.fromkeys(name for p in pieces for name in p.get("feats", {})):
            _scatter(frame, name, [p.get("feats", {}).get(name) for p in pieces], order[edge_type], root)
        if any("edge_time" in p for p in pieces):
            _scatter(frame, "edge_time", [p.get("edge_time") for p in pieces], order[edge_type], root)


def _scatter(frame: Frame, name: str, pieces: list[Any], ids: Tensor, root: Path) -> None:
    r"""Puts rows of all parts to their places; nothing where PyG kept nothing."""
    if all(piece is None for piece in pieces):
        return
    _check(all(isinstance(piece, Tensor) for piece in pieces), root, f"{name!r} in all parts", "only some")
    rows = torch.cat(pieces)
    _check(rows.size(0) == ids.numel(), root, f"{ids.numel()} rows of {name!r}", rows.size(0))
    out = torch.empty_like(rows)
    out[ids] = rows
    frame[name] = out


def _check(right: bool, path: Path, expected: str, found: Any) -> None:
    if not right:
        found = type(found).__name__ if isinstance(found, (dict, Tensor)) or found is None else found
        raise PartitionFileError(f"{path}: expected {expected}, found {found}; copy the partition again")
