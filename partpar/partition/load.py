r"""Opening a share, memory-mapped, and refusing whatever is not just what was written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from partpar.errors import MissingPartitionError, PartitionFileError
from partpar.graph import CSC, EdgeType, Frame, GraphData, Part
from partpar.partition.digest import file_digest
from partpar.partition.layout import MANIFEST, edge_key, node_key, partition_folder
from partpar.partition.manifest import FileRecord, Manifest, read_manifest
from partpar.partition.write import canonical

_MAX_HEADER = 1 << 24


def load_partition(
    root: str | Path, part_id: int | None, num_parts: int | None, algorithm: str, verify: bool | None
) -> GraphData:
    """See :meth:`partpar.GraphData.load_partition`."""
    part_id = _rank() if part_id is None else part_id
    num_parts = _world_size() if num_parts is None else num_parts
    folder = partition_folder(root, canonical(algorithm), num_parts)
    if not folder.is_dir():
        if (Path(root) / MANIFEST).is_file():
            raise MissingPartitionError(
                f"{root}: expected the folder of a graph's partitions, found a partition itself; pass its parent, "
                f"{str(Path(root).resolve().parent)!r}"
            )
        found = sorted(
            p.parent.name for p in Path(root).glob("*/manifest.json") if not p.parent.name.startswith(".")
        )
        raise MissingPartitionError(
            f"{folder}: expected a partition in {num_parts} parts by {algorithm!r}, found {', '.join(found) or 'none'} in {root}; "
            f"{_remedy(found, canonical(algorithm), num_parts)}"
        )
    if folder.is_symlink():
        raise PartitionFileError(
            f"{folder}: expected the folder of a partition, found a link; load it from where it lies, or copy it here"
        )
    manifest = read_manifest(folder)
    if manifest.num_parts != num_parts:
        raise PartitionFileError(
            f"{folder}: expected a partition in {num_parts} parts, found one in {manifest.num_parts}"
        )
    if not 0 <= part_id < num_parts:
        raise MissingPartitionError(f"{folder}: expected a part from 0 to {num_parts - 1}, found {part_id}")
    return open_share(folder, manifest, part_id, verify)


def _remedy(found: list[str], algorithm: str, num_parts: int) -> str:
    """How to come by one of the partitions that are there, or by the one that is not."""
    ways = []
    for name in found:
        other, _, parts = name.rpartition("_")
        if parts == str(num_parts):
            ways.append(f"pass algorithm={other!r}")
        elif other == algorithm and parts.isdecimal():
            ways.append(f"start {parts} workers (torchrun --standalone --nproc-per-node {parts} SCRIPT)")
    return ", or ".join([*ways, f"cut the graph by partition_graph into {num_parts} parts with {algorithm!r}"])


def open_share(folder: Path, manifest: Manifest, part_id: int, verify: bool | None = None) -> GraphData:
    r"""Opens one share of a partition whose manifest was read."""
    file = _TensorFile(folder, manifest.shares[part_id], manifest.run_id, verify)
    nodes, sources, edges, structure = {}, {}, {}, {}
    offsets = {t: torch.tensor(o) for t, o in manifest.node_offsets.items()}
    for node_type, offset in offsets.items():
        low, high = int(offset[part_id]), int(offset[part_id + 1])
        nodes[node_type], sources[node_type] = _node_frames(file, node_type, low, high, int(offset[-1]))
    for edge_type, edge_offset in manifest.edge_types:
        low, high = edge_offset[part_id], edge_offset[part_id + 1]
        num_src, num_dst = sources[edge_type[0]].num_rows, nodes[edge_type[2]].num_rows
        structure[edge_type] = _csc(file, edge_type, num_src, num_dst, high - low)
        columns: dict[str, Tensor | Callable[[], Tensor]] = dict(
            file.attributes(edge_key(edge_type, "attr", ""))
        )
        columns["raw_ids"] = file.reader(edge_key(edge_type, "raw_ids"), high - low)
        columns["ids"] = _range(low, high)
        edges[edge_type] = Frame(high - low, columns, f"edges of type {edge_type}")
    meta = dict(manifest.meta)
    if manifest.meta_file is not None:
        meta_file = _TensorFile(folder, manifest.meta_file, manifest.run_id, verify)
        meta.update({name: meta_file.read(name) for name in manifest.meta_file.tensors})
    part = Part(part_id, manifest.num_parts, offsets, manifest.run_id, manifest.windows)
    return GraphData(nodes, edges, structure, meta, sources, part)


def _node_frames(
    file: _TensorFile, node_type: str, low: int, high: int, num_nodes: int
) -> tuple[Frame, Frame]:
    halo_ids = file.integers(node_key(node_type, "halo_ids"))
    rising = bool((halo_ids.diff() > 0).all())
    outside = not bool(((halo_ids >= low) & (halo_ids < high)).any())
    if not (rising and outside and _within(halo_ids, num_nodes)):
        raise PartitionFileError(
            f"{file.path}: expected ascending ids below {num_nodes} and outside of {low} to {high - 1} in {node_key(node_type, 'halo_ids')!r}"
        )
    raw_ids = file.reader(node_key(node_type, "raw_ids"), high - low)
    halo_raw_ids = file.reader(node_key(node_type, "halo_raw_ids"), halo_ids.numel())
    columns: dict[str, Tensor | Callable[[], Tensor]] = dict(file.attributes(node_key(node_type, "attr", "")))
    owned = Frame(
        high - low,
        {**columns, "raw_ids": raw_ids, "ids": _range(low, high)},
        f"owned nodes of type {node_type!r}",
    )
    source = Frame(
        high - low + halo_ids.numel(),
        {
            "raw_ids": lambda: torch.cat([raw_ids(), halo_raw_ids()]),
            "ids": lambda: torch.cat([torch.arange(low, high), halo_ids]),
        },
        f"source nodes of type {node_type!r} (rows of the halo come by route.apply)",
    )
    return owned, source


def _range(low: int, high: int) -> Callable[[], Tensor]:
    return lambda: torch.arange(low, high)


def _csc(file: _TensorFile, edge_type: EdgeType, num_src: int, num_dst: int, num_edges: int) -> CSC:
    indptr, indices = (file.integers(edge_key(edge_type, name)) for name in ("indptr", "indices"))
    if (
        indptr.numel() != num_dst + 1
        or int(indptr[0]) != 0
        or int(indptr[-1]) != num_edges
        or bool((indptr.diff() < 0).any())
    ):
        raise PartitionFileError(
            f"{file.path}: expected {num_dst + 1} numbers that rise from 0 to {num_edges} in {edge_key(edge_type, 'indptr')!r}"
        )
    if indices.numel() != num_edges or not _within(indices, num_src):
        raise PartitionFileError(
            f"{file.path}: expected {num_edges} numbers from 0 to {num_src - 1} in {edge_key(edge_type, 'indices')!r}"
        )
    return CSC(indptr, indices)


def _within(indices: Tensor, size: int) -> bool:
    return indices.numel() == 0 or 0 <= int(indices.min()) <= int(indices.max()) < size


class _TensorFile:
    """A safetensors file that is what its record says; its tensors lie in the page cache and are shared by processes."""

    def __init__(self, folder: Path, record: FileRecord, run_id: str, verify: bool | None) -> None:
        self.path, self.record = folder / record.name, record
        if not self.path.is_file() or self.path.is_symlink():
            found = "a link" if self.path.is_symlink() else "none"
            raise MissingPartitionError(
                f"{self.path}: expected a file, found {found}; copy the share here or partition again"
            )
        size = self.path.stat().st_size
        if size != record.num_bytes:
            raise PartitionFileError(
                f"{self.path}: expected {record.num_bytes} bytes, found {size}; copy the share again"
            )
        if verify or (verify is None and not _verified_before(self.path, record)):
            digest = file_digest(self.path)
            if digest != record.sha256:
                raise PartitionFileError(
                    f"{self.path}: expected the checksum {record.sha256}, found {digest}; copy the share again"
                )
            _remember_verified(self.path, record)
        _check_header(self.path, size)
        try:
            self._handle: Any = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise PartitionFileError(
                f"{self.path}: expected a safetensors file, found {error}; copy the share again"
            ) from error
        found_run = (self._handle.metadata() or {}).get("run_id")
        if found_run != run_id:
            raise PartitionFileError(
                f"{self.path}: expected a share of run {run_id}, found one of run {found_run}; copy the share again"
            )
        if set(self._handle.keys()) != set(record.tensors):
            raise PartitionFileError(
                f"{self.path}: expected the tensors {sorted(record.tensors)}, found {sorted(self._handle.keys())}"
            )

    def read(self, name: str) -> Tensor:
        if name not in self.record.tensors:
            raise PartitionFileError(
                f"{self.path}: expected a tensor {name!r}, found {sorted(self.record.tensors)}"
            )
        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
            # A dtype that torch has none for, or a place that is no multiple of its size.
            raise PartitionFileError(f"{self.path}: expected a tensor {name!r}, found {error}") from error
        dtype, shape = self.record.tensors[name]
        if tensor.dtype != getattr(torch, dtype) or list(tensor.shape) != shape:
            raise PartitionFileError(
                f"{self.path}: expected {name!r} to be {dtype} {shape}, found {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor

    def integers(self, name: str, size: int | None = None) -> Tensor:
        """A tensor of ids, or of places: all else that is read may be anything."""
        tensor = self.read(name)
        fits = tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32)
        if not fits or size not in (None, tensor.numel()):
            raise PartitionFileError(
                f"{self.path}: expected {'' if size is None else f'{size} '}integers in {name!r}, found {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor

    def reader(self, name: str, size: int | None = None) -> Callable[[], Tensor]:
        return (lambda: self.read(name)) if size is None else (lambda: self.integers(name, size))

    def attributes(self, prefix: str) -> dict[str, Callable[[], Tensor]]:
        return {
            unquote(n.removeprefix(prefix)): self.reader(n)
            for n in self.record.tensors
            if n.startswith(prefix)
        }


def _check_header(path: Path, size: int) -> None:
    """The reader below parses a header of up to 100 MB; a share's takes some hundred bytes for each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise PartitionFileError(
            f"{path}: expected a safetensors header of at most {min(max(size - 8, 0), _MAX_HEADER)} bytes, found one of {length}; copy the share again"
        )


# --- checksums are read once on a machine ---------------------------------------------------------------------------


def _stamp(path: Path, record: FileRecord) -> Path:
    """Names a file that says: this file, as it is now, was verified."""
    # Not the home folder, which several machines may share.
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir()) / f"cache-{os.getuid()}")
    stat = path.stat()
    state = (
        f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {record.sha256}"
    )
    return base / "partpar" / "verified" / hashlib.sha256(state.encode()).hexdigest()


def _verified_before(path: Path, record: FileRecord) -> bool:
    return _stamp(path, record).exists()


def _remember_verified(path: Path, record: FileRecord) -> None:
    stamp = _stamp(path, record)
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        return  # a read-only machine verifies at every open


def _rank() -> int:
    return (
        dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))
    )


def _world_size() -> int:
    return (
        dist.get_world_size()
        if dist.is_available() and dist.is_initialized()
        else int(os.environ.get("WORLD_SIZE", "1"))
    )
