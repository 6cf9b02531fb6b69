r"""Cutting a whole graph and writing its shares: all or nothing."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from partpar.errors import GraphError, PartitionError, PartitionExistsError, PartitionFileError
from partpar.graph import EdgeType, GraphData, Windows
from partpar.graph.validate import validate_structure
from partpar.partition import phases, registry
from partpar.partition.cut import cut_share, plan_cut
from partpar.partition.digest import file_digest, run_id
from partpar.partition.layout import FORMAT_VERSION, MANIFEST, META, RESERVED, partition_folder, share_file
from partpar.partition.manifest import FileRecord, Manifest, describe, read_manifest
from partpar.partition.report import quality_report
from partpar.partition.weights import expand, make_problem
from partpar.partition.windows import make_windows

GIVEN = "given"  # the caller's own assignment


def canonical(algorithm: str) -> str:
    r"""An algorithm's one spelling, which names its folder."""
    return algorithm if algorithm == GIVEN else registry.canonical(algorithm)


def partition_graph(
    graph: GraphData,
    root: str | Path,
    num_parts: int,
    node_weight: str | list[str] | None,
    edge_weight: str | Mapping[EdgeType, float | str] | None,
    algorithm: str,
    options: dict[str, Any],
    overwrite: bool,
    time_attr: str | None = None,
    num_snapshots: int | None = None,
    boundaries: Sequence[float] | None = None,
) -> Path:
    """See :meth:`partpar.GraphData.partition_graph`."""
    algorithm = canonical(algorithm)
    if isinstance(num_parts, bool) or not isinstance(num_parts, int) or num_parts < 1:
        raise PartitionError(f"num_parts: expected an integer of at least 1, found {num_parts!r}")
    if graph.part is not None or any(graph.num_halo(t) for t in graph.node_types):
        raise PartitionError("partition_graph: expected a whole graph, found a share")
    phases.enter("check the graph")
    _check_names(graph)
    validate_structure(graph)
    weights, options = _defaults_omitted(
        algorithm, [node_weight] if isinstance(node_weight, str) else list(node_weight or []), options
    )
    arguments = {
        "num_parts": num_parts,
        "algorithm": algorithm,
        "node_weight": weights,
        "edge_weight": {"__".join(e): w for e, w in edge_weight.items()}
        if isinstance(edge_weight, Mapping)
        else edge_weight,
        "options": options,
    }
    phases.enter("compute its digest")
    windows = make_windows(graph, time_attr, num_snapshots, boundaries)
    if windows is not None:
        arguments["windows"] = asdict(windows)
    digest = run_id(graph, {"format_version": FORMAT_VERSION, **arguments})
    folder = partition_folder(root, algorithm, num_parts)
    _check_root(folder.parent)
    seed = options.get("seed", 0)
    if not isinstance(seed, int):
        raise PartitionError(f"seed: expected an integer, found {seed!r}")
    problem = make_problem(graph, num_parts, weights, edge_weight, seed)
    special = {k: v for k, v in options.items() if k != "seed"}
    if algorithm != GIVEN:
        registry.check_options(algorithm, special)
    if _stands(folder, digest, arguments, overwrite, graph):
        return folder
    phases.enter(phases.ASSIGN)
    assignment = _assign(graph, problem, algorithm, special)

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        os.chmod(scratch, 0o777 & ~_umask())
        constraints = {
            name: np.bincount(assignment, np.asarray(w, dtype=np.float64), num_parts)
            for name, w in problem.node_weights.items()
        }
        _write_all(graph, scratch, _by_type(graph, assignment), constraints, digest, arguments, windows)
        phases.enter("publish")
        _publish(scratch, folder, digest, arguments, overwrite)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _check_root(root: Path) -> None:
    for place in (root, *root.parents):
        if place.exists():
            if not place.is_dir():
                raise PartitionError(f"root {root}: expected a folder, or a place for one, found the file {place}; name another")
            return


def _check_names(graph: GraphData) -> None:
    for frame in [graph.node(t) for t in graph.node_types] + [graph.edge(t) for t in graph.edge_types]:
        for name in RESERVED:
            if name in frame:
                raise GraphError(
                    f"attribute {name!r} of {frame.what}: shares use this name themselves; rename it"
                )


def _defaults_omitted(
    algorithm: str, weights: list[str], options: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """One spelling of node weights and options that ask for the same: what is told though it is the default goes, but
    several default constraints are told."""
    if algorithm == "multi-constraint-metis":
        weights = weights or ["#nodes", "#in_edges"]
    elif weights == ["#nodes"]:
        weights = []
    seeded = {name: value for name, value in options.items() if name != "seed" or type(value) is not int or value}
    return weights, seeded


def _recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as a manifest keeps them: a given assignment is an array, told by the run id alone."""
    options = {k: v for k, v in arguments["options"].items() if k != "assignment"}
    return {**{k: arguments[k] for k in ("node_weight", "edge_weight")}, "options": options}


def _stands(
    folder: Path, digest: str, arguments: Mapping[str, Any], overwrite: bool, graph: GraphData | None = None
) -> bool:
    """Whether this very partition is there already; raises where another one may not be replaced. With the graph, one
    whose manifest tells defaults, as older ones do, is known again."""
    if not folder.exists():
        return False
    try:
        manifest = read_manifest(folder)
    except PartitionFileError as error:
        found = f"an unreadable one ({error})"
    else:
        if manifest.run_id == digest:
            return True
        recorded = json.loads(json.dumps(_recorded(arguments)))
        stands = dict(manifest.arguments)
        told: dict[str, Any] = {name: stands[name] for name in ("node_weight", "options") if name in stands}
        if len(told) == 2 and isinstance(told["options"], dict):
            stands["node_weight"], stands["options"] = _defaults_omitted(manifest.algorithm, *told.values())
        if graph is not None and stands == recorded != manifest.arguments:
            told["options"] = {**arguments["options"], **told["options"]}
            if manifest.run_id == run_id(graph, {"format_version": FORMAT_VERSION, **arguments, **told}):
                return True
        differ = [
            f"{name} {stands[name]!r} instead of {value!r}"
            for name, value in recorded.items()
            if name in stands and stands[name] != value
        ]
        if (manifest.windows and asdict(manifest.windows)) != arguments.get("windows"):
            differ.append("other windows of time, or none")
        found = f"one made with {', '.join(differ)}" if differ else "one made from another graph"
    if overwrite:
        return False
    raise PartitionExistsError(
        f"{folder}: expected no partition, or that of this graph and these arguments; found {found}; pass "
        "overwrite=True (--overwrite on the command line) to replace it, or another root"
    )


def _assign(
    graph: GraphData, problem: registry.Problem, algorithm: str, options: dict[str, Any]
) -> np.ndarray:
    if algorithm != GIVEN:
        return registry.assign(algorithm, problem, **options)
    given = options.get("assignment")
    if given is None or set(options) - {"assignment"}:
        raise PartitionError(
            f"algorithm 'given': expected partition_kwargs={{'assignment': …}}, found {sorted(options)}"
        )
    pieces = given if isinstance(given, Mapping) else {graph.node_types[0]: given}
    if set(pieces) != set(graph.node_types):
        raise PartitionError(
            f"assignment: expected one for each of {graph.node_types}, found {sorted(pieces)}"
        )
    for node_type, piece in pieces.items():
        parts = np.asarray(piece)
        if parts.shape != (graph.num_nodes(node_type),) or parts.dtype.kind not in "iu":
            raise PartitionError(
                f"assignment: expected {graph.num_nodes(node_type)} integers, found {parts.dtype} of shape {parts.shape}"
            )
        if parts.size and not 0 <= parts.min() <= parts.max() < problem.num_parts:
            raise PartitionError(
                f"assignment: expected parts 0 to {problem.num_parts - 1}, found {parts.min()} to {parts.max()}"
            )
    return np.concatenate([np.asarray(pieces[t]) for t in graph.node_types]).astype(np.int32)


def _by_type(graph: GraphData, assignment: np.ndarray) -> dict[str, Tensor]:
    sizes = [graph.num_nodes(t) for t in graph.node_types]
    return dict(zip(graph.node_types, torch.from_numpy(assignment).split(sizes), strict=True))


def _write_all(
    graph: GraphData,
    scratch: Path,
    assignment: dict[str, Tensor],
    constraints: dict[str, np.ndarray],
    digest: str,
    arguments: dict[str, Any],
    windows: Windows | None,
) -> None:
    num_parts = arguments["num_parts"]
    cut = plan_cut(graph, assignment, num_parts)
    shares, counts = [], []
    for part_id in range(num_parts):
        phases.enter("write shares", part_id, num_parts)
        tensors, count = cut_share(graph, cut, part_id)
        shares.append(_write_tensors(scratch / share_file(part_id), tensors, digest))
        counts.append(count)
    meta = graph.meta()
    meta_tensors = {k: v.contiguous() for k, v in meta.items() if isinstance(v, Tensor)}
    widths = {t: graph.node(t)["x"].shape[1:].numel() for t in graph.node_types if "x" in graph.node(t)}
    owned = {t: torch.tensor([c.owned[t] for c in counts]) for t in graph.node_types}
    edges = {e: torch.tensor([c.edges[e] for c in counts]) for e in graph.edge_types}
    manifest = Manifest(
        run_id=digest,
        num_parts=num_parts,
        algorithm=arguments["algorithm"],
        arguments=_recorded(arguments),
        node_offsets={t: [0, *n.cumsum(0).tolist()] for t, n in owned.items()},
        edge_types=[(e, [0, *n.cumsum(0).tolist()]) for e, n in edges.items()],
        shares=shares,
        meta={k: v for k, v in meta.items() if k not in meta_tensors},
        meta_file=_write_tensors(scratch / META, meta_tensors, digest) if meta_tensors else None,
        report={
            **quality_report(counts, constraints, widths),
            "left_out": expand(graph, arguments["node_weight"])[1],
        },
        windows=windows,
    )
    path = scratch / MANIFEST
    path.write_text(manifest.to_json())
    _sync(path)
    _sync(scratch)


def _write_tensors(path: Path, tensors: dict[str, Tensor], digest: str) -> FileRecord:
    # One metadata key at most: safetensors orders several at random, and the same input must give the same bytes.
    try:
        save_file(tensors, path, metadata={"run_id": digest})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}; free some space or name another root") from None
    _sync(path)
    return FileRecord(path.name, path.stat().st_size, file_digest(path), describe(tensors))


def _publish(scratch: Path, folder: Path, digest: str, arguments: Mapping[str, Any], overwrite: bool) -> None:
    """Makes the partition visible in one rename; what stood there goes only once it is replaced."""
    old = None
    if folder.exists() and overwrite and _swap(scratch, folder):
        _sync(folder.parent)
        return  # what stood there is what goes as scratch
    if folder.exists() and overwrite:
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-replaced-", dir=folder.parent))
        os.rename(folder, old / "partition")
    try:
        os.rename(scratch, folder)
    except OSError:
        if old is not None:
            os.rename(old / "partition", folder)
        elif not (folder.exists() and _stands(folder, digest, arguments, overwrite=False)):
            raise
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Has two folders change places at once, where the system can: a kill between two renames would leave none."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    here, at_once = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(exchange(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), ctypes.c_uint(at_once)) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
