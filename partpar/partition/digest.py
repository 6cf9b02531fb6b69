r"""Digests: of a graph and arguments (the run id), and of files (checksums)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.graph import GraphData

_CHUNK = 1 << 24


def file_digest(path: Path) -> str:
    r"""SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def run_id(graph: GraphData, arguments: Mapping[str, Any]) -> str:
    r"""Digest of a whole graph and of what is to be done with it: equal ids mean equal partitions, byte for byte."""
    digest = hashlib.sha256()
    digest.update(json.dumps(arguments, sort_keys=True, default=_describe).encode())
    for node_type in graph.node_types:
        digest.update(f"node {node_type!r} {graph.num_nodes(node_type)}".encode())
        for name, value in sorted(graph.node(node_type).items()):
            _update(digest, name, value)
    for edge_type in graph.edge_types:
        _update(digest, f"edge {edge_type!r}", graph.edge_index(edge_type))
        for name, value in sorted(graph.edge(edge_type).items()):
            _update(digest, name, value)
    for name, value in sorted(graph.meta().items()):
        if isinstance(value, Tensor):
            _update(digest, name, value)
        else:
            digest.update(f"{name!r} {json.dumps(value)}".encode())
    return digest.hexdigest()[:32]


def _update(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name!r} {value.dtype} {tuple(value.shape)}".encode())
    flat = value if value.dim() else value.view(1)
    rows = max(1, _CHUNK // max(1, flat[:1].numel() * flat.element_size()))
    for start in range(0, flat.size(0), rows):
        digest.update(flat[start : start + rows].contiguous().view(-1).view(torch.uint8).numpy())


def _describe(value: Any) -> Any:
    """Arguments of an algorithm may be arrays, such as a ready assignment."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256()
        _update(digest, "", value.cpu())
        return digest.hexdigest()
    return _describe(torch.as_tensor(value))
