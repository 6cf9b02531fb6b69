r"""Whether a partition on disk is whole: files, bounds, and that its shares tile the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.errors import PartparError
from partpar.graph import GraphData
from partpar.partition.assemble import join
from partpar.partition.digest import run_id
from partpar.partition.layout import FORMAT_VERSION, MANIFEST, edge_key, node_key, partition_folder
from partpar.partition.load import open_share
from partpar.partition.manifest import FileRecord, Manifest, read_manifest
from partpar.partition.write import GIVEN


@dataclass(frozen=True)
class Finding:
    r"""One thing that is wrong.

    Args:
        file: Name of the file that it is wrong in.
        what: What was expected and what was found.
    """

    file: str
    what: str


@dataclass
class Verification:
    r"""What was looked at and what was found.

    Args:
        checks: For each check that was made, whether it passed.
        findings: All that is wrong, in the order in which it was found.
    """

    checks: dict[str, bool] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.findings

    def run(self, check: str, look: Callable[[], list[Finding]]) -> None:
        r"""Makes a check and keeps what it finds."""
        found = look()
        self.checks[check] = not found
        self.findings += found


def verify_partition(folder: str | Path, contents: bool = True) -> Verification:
    r"""Reads all of a partition: sizes, checksums and run id of every file, bounds of every index, that every node is
    owned once and every edge is in one share, that halos name the nodes they stand for, that the quality report is of
    these shares, and that graph and arguments are those whose digest the run id is.

    Args:
        folder: Of the partition, such as ``root/metis_4``.
        contents: Whether to put the graph together again and compare its digest, which takes the memory of the whole
            graph. The digest of a cut that was given by its caller cannot be made again, and is not compared.

    Raises:
        PartitionFileError: If there is no manifest that can be read.
    """
    folder = Path(folder)
    manifest, found = read_manifest(folder), Verification()
    shares: dict[int, GraphData] = {}

    def files() -> list[Finding]:
        wrong = []
        for part, record in enumerate(manifest.shares):
            try:
                shares[part] = open_share(folder, manifest, part, verify=True)
            except PartparError as error:
                wrong.append(Finding(record.name, str(error)))
        return wrong

    found.run("files: sizes, checksums, run id, bounds", files)
    found.run("folder and attributes fit the manifest", lambda: _described(folder, manifest))
    found.run("every node is owned once", lambda: _nodes_once(manifest, shares))
    found.run("every edge is in one share", lambda: _edges_once(manifest, shares))
    if len(shares) == manifest.num_parts and found.whole:
        found.run("halos name the nodes they stand for", lambda: _halos(manifest, shares))
        found.run("the quality report is of these shares", lambda: _report(manifest, shares))
        if contents and found.whole and manifest.algorithm != GIVEN:
            found.run("graph and arguments have the digest of the run id", lambda: _digest(manifest, shares))
    return found


def _described(folder: Path, manifest: Manifest) -> list[Finding]:
    wrong = []
    name = partition_folder("", manifest.algorithm, manifest.num_parts).name
    if folder.resolve().name != name:
        what = f"expected the folder of this partition to be called {name}, found {folder.resolve().name}"
        wrong.append(Finding(MANIFEST, what))
    for part, record in enumerate(manifest.shares):
        for key, (_, shape) in record.tensors.items():
            rows = _rows(manifest, part, key)
            if rows is not None and shape[:1] != [rows]:
                wrong.append(Finding(record.name, f"expected {rows} rows in {key!r}, found shape {shape}"))
        if set(record.tensors) != set(manifest.shares[0].tensors):
            different = sorted(set(record.tensors) ^ set(manifest.shares[0].tensors))
            wrong.append(Finding(record.name, f"expected the same tensors in all shares, found only in some: {different}"))
    return wrong


def _rows(manifest: Manifest, part: int, key: str) -> int | None:
    r"""How many rows a tensor must have, if the manifest says: those of attributes and raw ids."""
    for node_type, offsets in manifest.node_offsets.items():
        if _is_column(key, "node", (node_type,)):
            return offsets[part + 1] - offsets[part]
    for edge_type, offsets in manifest.edge_types:
        if _is_column(key, "edge", edge_type):
            return offsets[part + 1] - offsets[part]
    return None


def _is_column(key: str, kind: str, name: tuple[str, ...]) -> bool:
    prefix = node_key(*name) if kind == "node" else edge_key((name[0], name[1], name[2]))
    return key.startswith(f"{prefix}/attr/") or key == f"{prefix}/raw_ids"


def _nodes_once(manifest: Manifest, shares: dict[int, GraphData]) -> list[Finding]:
    wrong = []
    for node_type, offsets in manifest.node_offsets.items():
        pieces = {part: share.node(node_type)["raw_ids"] for part, share in shares.items()}
        wrong += _once("node", node_type, offsets[-1], pieces, manifest.shares)
    if sum(offsets[-1] for offsets in manifest.node_offsets.values()) != manifest.report.get("num_nodes"):
        wrong.append(Finding(MANIFEST, f"expected {manifest.report.get('num_nodes')} nodes, as its report says; its offsets say otherwise"))
    return wrong


def _edges_once(manifest: Manifest, shares: dict[int, GraphData]) -> list[Finding]:
    wrong = []
    for edge_type, offsets in manifest.edge_types:
        pieces = {part: share.edge(edge_type)["raw_ids"] for part, share in shares.items()}
        wrong += _once("edge", "-".join(edge_type), offsets[-1], pieces, manifest.shares)
    if sum(offsets[-1] for _, offsets in manifest.edge_types) != manifest.report.get("num_edges"):
        wrong.append(Finding(MANIFEST, f"expected {manifest.report.get('num_edges')} edges, as its report says; its offsets say otherwise"))
    return wrong


def _once(kind: str, name: str, count: int, pieces: dict[int, Tensor], records: list[FileRecord]) -> list[Finding]:
    r"""Raw ids of all shares must be 0 to ``count - 1``, each once."""
    wrong: list[Finding] = []
    holder = torch.full((count,), -1, dtype=torch.int32)
    for part, raw_ids in pieces.items():
        outside = raw_ids[(raw_ids < 0) | (raw_ids >= count)]
        if outside.numel():
            wrong.append(Finding(records[part].name, f"expected raw ids of {kind}s of type {name} below {count}, found {int(outside[0])}"))
        inside = raw_ids[(raw_ids >= 0) & (raw_ids < count)]
        times = torch.bincount(inside, minlength=count) if inside.numel() else torch.zeros(count, dtype=torch.int64)
        again = (times > 0) & ((holder >= 0) | (times > 1))
        if bool(again.any()):
            first = int(again.nonzero()[0])
            where = records[int(holder[first])].name if int(holder[first]) >= 0 else records[part].name
            what = f"{int(again.sum())} {kind}(s) of type {name} are in two shares or twice in one, such as raw id {first}, also in {where}"
            wrong.append(Finding(records[part].name, what))
        holder[inside] = part
    missing = (holder < 0).nonzero().flatten()
    if missing.numel() and len(pieces) == len(records):
        what = f"{missing.numel()} {kind}(s) of type {name} are in no share, such as raw id {int(missing[0])}"
        wrong.append(Finding(MANIFEST, what))
    return wrong


def _halos(manifest: Manifest, shares: dict[int, GraphData]) -> list[Finding]:
    wrong = []
    for node_type in manifest.node_offsets:
        raw = torch.cat([shares[part].node(node_type)["raw_ids"] for part in range(manifest.num_parts)])
        for part, share in shares.items():
            sources, owned = share.node(node_type, "src"), share.num_owned(node_type)
            bad = (raw[sources["ids"]] != sources["raw_ids"]).nonzero().flatten()
            if bad.numel():
                what = f"{bad.numel()} halo node(s) of type {node_type!r} have other raw ids than at their owners, such as id {int(sources['ids'][bad[0]])}"
                wrong.append(Finding(manifest.shares[part].name, what))
            used = torch.zeros(sources.num_rows, dtype=torch.bool)
            for edge_type, _ in manifest.edge_types:
                if edge_type[0] == node_type:
                    used[share.csc(edge_type)[1].long()] = True
            idle = int((~used[owned:]).sum())
            if idle:
                wrong.append(Finding(manifest.shares[part].name, f"{idle} halo node(s) of type {node_type!r} are the source of no edge"))
    for edge_type, _ in manifest.edge_types:
        for part, share in shares.items():
            indptr, raw_edges = share.csc(edge_type)[0], share.edge(edge_type)["raw_ids"]
            begins = torch.zeros(raw_edges.numel() + 1, dtype=torch.bool)
            begins[indptr] = True
            if bool(((raw_edges.diff() <= 0) & ~begins[1:-1]).any()):
                wrong.append(Finding(manifest.shares[part].name, f"edges of type {'-'.join(edge_type)} into one node are not in the order of their raw ids"))
    return wrong


def _report(manifest: Manifest, shares: dict[int, GraphData]) -> list[Finding]:
    nodes, edges = manifest.report.get("nodes", {}), manifest.report.get("edges", {})
    parts = [shares[part] for part in range(manifest.num_parts)]
    expected: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for node_type in manifest.node_offsets:
        of = nodes.get(node_type, {})
        for key, counts in (("owned", [s.num_owned(node_type) for s in parts]), ("halo", [s.num_halo(node_type) for s in parts])):
            expected[f"{key} of {node_type}"], told[f"{key} of {node_type}"] = counts, of.get(key)
    for edge_type, _ in manifest.edge_types:
        name = "__".join(edge_type)
        owned = [s.num_owned(edge_type[0]) for s in parts]
        cut = [int((s.csc(edge_type)[1] >= n).sum()) for s, n in zip(parts, owned, strict=True)]
        for key, counts in (("edges", [s.num_edges(edge_type) for s in parts]), ("cut_edges", cut)):
            expected[f"{key} of {name}"], told[f"{key} of {name}"] = counts, edges.get(name, {}).get(key)
    return [
        Finding(MANIFEST, f"its report says {told[what]} {what} in the parts, found {counts}")
        for what, counts in expected.items()
        if told[what] != counts
    ]


def _digest(manifest: Manifest, shares: dict[int, GraphData]) -> list[Finding]:
    graph = join([shares[part] for part in range(manifest.num_parts)], manifest)
    arguments = {"num_parts": manifest.num_parts, "algorithm": manifest.algorithm, **manifest.arguments}
    if manifest.windows is not None:
        arguments["windows"] = asdict(manifest.windows)
    digest = run_id(graph, {"format_version": FORMAT_VERSION, **arguments})
    if digest == manifest.run_id:
        return []
    return [Finding(MANIFEST, f"expected the digest {manifest.run_id} of graph and arguments, found {digest}: attributes, edges or arguments are not those that were cut")]
