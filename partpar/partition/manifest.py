r"""The manifest: what a partition is and what each of its files must be, as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.errors import MissingPartitionError, PartitionFileError
from partpar.graph import EdgeType, Windows
from partpar.partition.layout import FORMAT, FORMAT_VERSION, MANIFEST

_MAX_BYTES = 1 << 28
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # in the partition's own folder, on any file system
_HEX = re.compile(r"[0-9a-f]{1,128}")


@dataclass(frozen=True)
class FileRecord:
    r"""One file: its name in the folder, size, SHA-256, and ``{tensor name: [dtype, shape]}``."""

    name: str
    num_bytes: int
    sha256: str
    tensors: dict[str, list[Any]]


@dataclass(frozen=True)
class Manifest:
    r"""See ``manifest.json`` of any partition.

    Args:
        run_id: Digest of the graph and the arguments; every share carries it.
        arguments: What the partition was asked for: node and edge weights and the algorithm's own arguments.
        node_offsets: ``num_parts + 1`` numbers for each node type.
        edge_types: Edge types and, beside each, ``num_parts + 1`` numbers.
        meta: Plain values of the graph as a whole.
        meta_file: The file of its tensors, if there are any.
        report: The quality report, see :mod:`partpar.partition.report`.
        windows: Of time, if the graph is temporal.
    """

    run_id: str
    num_parts: int
    algorithm: str
    arguments: dict[str, Any]
    node_offsets: dict[str, list[int]]
    edge_types: list[tuple[EdgeType, list[int]]]
    shares: list[FileRecord]
    meta: dict[str, Any] = field(default_factory=dict)
    meta_file: FileRecord | None = None
    report: dict[str, Any] = field(default_factory=dict)
    windows: Windows | None = None

    def to_json(self) -> str:
        return (
            json.dumps(
                {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1, default=str
            )
            + "\n"
        )


def describe(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    r"""Dtype and shape of every tensor, as a :class:`FileRecord` keeps them."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def read_manifest(folder: str | Path) -> Manifest:
    r"""Reads and checks ``manifest.json`` of a partition's folder.

    Raises:
        MissingPartitionError: There is none.
        PartitionFileError: It is not JSON, not of partpar, of a newer format, or not what a manifest must be.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise MissingPartitionError(f"{path}: expected the manifest of a partition, found no file")
    if path.is_symlink():
        raise PartitionFileError(f"{path}: expected a file, found a link; copy the manifest here")
    if path.stat().st_size > _MAX_BYTES:
        raise PartitionFileError(
            f"{path}: expected a manifest of at most {_MAX_BYTES} bytes, found {path.stat().st_size}"
        )
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PartitionFileError(
            f"{path}: expected JSON, found {error}; restore the file or partition again"
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise PartitionFileError(f"{path}: expected the format {FORMAT!r}, found {found!r}")
    version = raw.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise PartitionFileError(
            f"{path}: expected format version 1 to {FORMAT_VERSION}, found {version!r}; upgrade partpar or partition again"
        )
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PartitionFileError(
            f"{path}: not a valid manifest ({type(error).__name__}: {error}); restore the file or partition again"
        ) from error


def _parse(raw: dict[str, Any]) -> Manifest:
    num_parts = _count(raw["num_parts"])
    edge_types = []
    for name, offsets in raw["edge_types"]:
        source, relation, destination = (_text(s) for s in name)
        edge_types.append(((source, relation, destination), _offsets(offsets, num_parts)))
    shares = [_record(r) for r in raw["shares"]]
    if num_parts < 1 or len(shares) != num_parts:
        raise ValueError(f"expected {num_parts} shares, found {len(shares)}")
    node_offsets = {_text(t): _offsets(o, num_parts) for t, o in raw["node_offsets"].items()}
    for name, _ in edge_types:
        if name[0] not in node_offsets or name[2] not in node_offsets:
            raise ValueError(f"edge type {name} joins node types that are not there")
    return Manifest(
        run_id=_hex(raw["run_id"]),
        num_parts=num_parts,
        algorithm=_text(raw["algorithm"]),
        arguments=_mapping(raw["arguments"]),
        node_offsets=node_offsets,
        edge_types=edge_types,
        shares=shares,
        meta=_mapping(raw["meta"]),
        meta_file=None if raw["meta_file"] is None else _record(raw["meta_file"]),
        report=_mapping(raw["report"]),
        windows=_windows(raw.get("windows")),  # older partitions have none
    )


def _windows(raw: Any) -> Windows | None:
    if raw is None:
        return None
    boundaries = tuple(raw["boundaries"])
    numbers = all(
        (type(b) is int and abs(b) < 2**63) or (type(b) is float and math.isfinite(b)) for b in boundaries
    )
    if len(boundaries) < 2 or not numbers or any(a > b for a, b in pairwise(boundaries)):
        raise ValueError(f"expected at least 2 finite numbers that rise as boundaries of windows, found {boundaries[:8]}")
    return Windows(_text(raw["time_attr"]), boundaries)


def _record(raw: dict[str, Any]) -> FileRecord:
    name = _text(raw["name"])
    if _FILE.fullmatch(name) is None:
        raise ValueError(f"expected the name of a file in the partition's own folder, found {name!r}")
    tensors = {}
    for key, (dtype, shape) in raw["tensors"].items():
        if not isinstance(vars(torch).get(_text(dtype)), torch.dtype):  # getattr would import modules of torch's
            raise ValueError(f"tensor {key!r}: {dtype!r} is no dtype")
        tensors[key] = [dtype, [_count(n) for n in shape]]
    return FileRecord(name, _count(raw["num_bytes"]), _hex(raw["sha256"]), tensors)


def _offsets(raw: Iterable[int], num_parts: int) -> list[int]:
    offsets = [_count(n) for n in raw]
    if (
        len(offsets) != num_parts + 1
        or offsets[0] != 0
        or any(a > b for a, b in pairwise(offsets))
    ):
        raise ValueError(f"expected {num_parts + 1} offsets that rise from 0, found {offsets[:8]}")
    return offsets


def _count(raw: Any) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not 0 <= raw < 2**62:
        raise ValueError(f"expected a count, found {raw!r}")
    return raw


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"expected a string, found {raw!r}")
    return raw


def _hex(raw: Any) -> str:
    if _HEX.fullmatch(_text(raw)) is None:
        raise ValueError(f"expected hexadecimal digits, found {raw!r}")
    return str(raw)


def _mapping(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise TypeError(f"expected an object, found {raw!r}")
    return raw
