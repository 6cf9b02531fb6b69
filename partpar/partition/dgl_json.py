r"""The part of each node in a partition that DGL wrote: its JSON file's ranges and the mapping of ids beside them.

DGL keeps graph and features in files of its own, which nothing but DGL reads. What is needed is readable: node ids
after shuffling are ranges of parts, and ``partition_graph(..., return_mapping=True)`` gives the raw id of each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partpar.errors import MissingPartitionError, PartitionFileError
from partpar.graph import NODE
from partpar.graph.npz import read_npz
from partpar.graph.torch_file import read_saved

DGL_NODE = "_N"  # the only node type of a graph without types


def read_dgl_assignment(config: str | Path, mapping: str | Path | None = None) -> tuple[int, dict[str, Tensor]]:
    r"""The number of parts, and the part of each node by raw id.

    Args:
        config: DGL's JSON file.
        mapping: The raw ids of shuffled ids, in a ``.npy`` file, an ``.npz`` file with an array for each node type, or
            a ``.pt`` file of a tensor or a dictionary of tensors. Without it, nodes keep the order they have in DGL's
            ranges: right where the graph was shuffled alike.

    Returns:
        The number of parts, and int64 ``[num_nodes]`` for each node type.

    Raises:
        PartitionFileError: If a file is missing, damaged, not readable without DGL, or they do not fit.
    """
    config = Path(config)
    raw = _json(config)
    try:
        num_parts = int(raw["num_parts"])
        ranges = {t: _sizes(r, num_parts) for t, r in raw["node_map"].items() if not isinstance(r, str)}
        files = {t: config.parent / r for t, r in raw["node_map"].items() if isinstance(r, str)} if isinstance(raw["node_map"], dict) else {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(raw.get("node_map"), str):  # a graph without types that was not shuffled
            files, ranges, num_parts = {DGL_NODE: config.parent / raw["node_map"]}, {}, int(raw["num_parts"])
        else:
            raise PartitionFileError(f"{config}: expected num_parts and node_map of DGL's partition_graph, found {type(error).__name__}: {error}") from error
    found = {t: torch.from_numpy(np.load(path, allow_pickle=False)).long() for t, path in files.items()}
    raw_ids = {} if mapping is None else _mapping(Path(mapping), list(ranges))
    for node_type, sizes in ranges.items():
        parts = torch.repeat_interleave(torch.arange(num_parts), torch.tensor(sizes))
        order = raw_ids.get(node_type, torch.arange(parts.numel()))
        if not torch.equal(order.sort().values, torch.arange(parts.numel())):
            raise PartitionFileError(
                f"{mapping}: expected each of 0 to {parts.numel() - 1} once for node type {node_type!r}, found {order.numel()} others"
            )
        found[node_type] = torch.empty_like(parts)
        found[node_type][order] = parts
    return num_parts, {NODE if list(found) == [DGL_NODE] else t: p for t, p in found.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingPartitionError(f"{path}: expected the JSON file that DGL's partition_graph writes, found none")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PartitionFileError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(raw, dict):
        raise PartitionFileError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _sizes(ranges: Any, num_parts: int) -> list[int]:
    # Ranges of a type lie among the ids of all types; within the type, parts follow each other.
    sizes = [int(stop) - int(start) for start, stop in ranges]
    if len(sizes) != num_parts or min(sizes) < 0:
        raise ValueError(f"expected {num_parts} ranges, found {ranges}")
    return sizes


def _mapping(path: Path, node_types: list[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingPartitionError(f"{path}: expected the mapping of node ids, found none")
    try:
        if path.suffix == ".npz":
            found: Any = {name: torch.from_numpy(a) for name, a in read_npz(path, PartitionFileError).items()}
        elif path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = read_saved(path, PartitionFileError, "a tensor")
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise PartitionFileError(
            f"{path}: expected .npy, .npz or a tensor written by torch.save, found something else; files of DGL's own need "
            "DGL once: torch.save(dgl.data.utils.load_tensors(path), 'mapping.pt')"
        ) from error
    if isinstance(found, Tensor):
        found = {node_types[0]: found}
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()) or set(found) != set(node_types):
        names = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise PartitionFileError(f"{path}: expected a mapping for each of {node_types}, found {names}")
    return {name: ids.long() for name, ids in found.items()}
