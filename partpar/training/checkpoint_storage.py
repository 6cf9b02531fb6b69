r"""How :mod:`torch.distributed.checkpoint` writes and reads our checkpoints: safetensors and JSON, and no pickle.

Its own file system writer keeps a pickle of metadata beside the data, and one of each value that is no tensor. These two
take their places: tensors go to one safetensors file for each rank, all else to the manifest.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from partpar.errors import CheckpointError, CheckpointWriteError, PartparError, RankLostError
from partpar.lost import awaiting
from partpar.partition.digest import file_digest
from partpar.training import checkpoint_files as files
from partpar.training.checkpoint_files import Chunk, Manifest, Stored

_MATTER = "checkpoints"


def write(root: Path, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor], group: Any, keep: int) -> None:
    r"""Writes a checkpoint (collective).

    Args:
        root: The folder of checkpoints.
        step: Of this one.
        state: See :class:`~partpar.training.checkpoint_files.Manifest`.
        tensors: In host memory, contiguous; nobody else changes them.
        group: Process group that nobody else talks on; :obj:`None` when alone.
        keep: How many checkpoints to leave there.

    Raises:
        CheckpointWriteError: Some rank could not write; on every rank.
        RankLostError: A rank is gone, or late.
    """
    _hush()
    writer = _Writer(root, step, state, keep)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with awaiting(group, f"the checkpoint of step {step}", _MATTER):
            dcp_save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except RankLostError:
        raise
    except (CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointWriteError(f"the checkpoint of step {step} was not written: {_told(error)}") from error


def read(root: Path, manifest: Manifest, into: dict[str, Tensor], group: Any) -> None:
    r"""Fills tensors from a checkpoint (collective).

    Args:
        root: The folder of checkpoints.
        manifest: Of this one.
        into: Tensors by name; ranks may ask for different ones, and for different rows of one.
        group: As for :func:`write`.

    Raises:
        CheckpointError: Some rank could not read; on every rank.
        RankLostError: A rank is gone, or late.
    """
    _hush()
    reader = _Reader(files.final_folder(root, manifest.step), manifest)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with awaiting(group, f"the reading of the checkpoint of step {manifest.step}", _MATTER):
            dcp_load(into, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except RankLostError:
        raise
    except (CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointError(f"the checkpoint of step {manifest.step} was not read: {_told(error)}") from error


def _hush() -> None:
    """A process alone need not be told so for each checkpoint."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _told(error: BaseException) -> str:
    """What went wrong on which rank, without the tracebacks."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
    # Our own errors say all in their text; of others the name is the half of it.
    named = {rank: "" if isinstance(cause, PartparError) else f"{type(cause).__name__}: " for rank, cause in causes.items()}
    return "; ".join(f"rank {rank}: {named[rank]}{cause}" for rank, cause in causes.items())


class _Writer(StorageWriter):
    r"""One rank's part of a checkpoint that is being written."""

    def __init__(self, root: Path, step: int, state: dict[str, Any], keep: int) -> None:
        self._root, self._step, self._state, self._keep = root, step, state, keep

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        files.partial_folder(self._root, self._step).mkdir(exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data={"file": f"{rank:03d}.safetensors", "world_size": len(plans)})
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name: str = plan.storage_data["file"]
        results: list[WriteResult] = []
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            if tensor.numel() == 0:
                continue
            offsets = tuple(item.index.offset or [0] * tensor.dim())
            key = item.index.fqn
            if item.type == WriteItemType.SHARD:
                key += "@" + ",".join(map(str, offsets))
            tensors[key] = tensor
            chunk = Chunk(offsets, tuple(tensor.shape), name, key)
            results.append(WriteResult(item.index, tensor.nbytes, chunk))
        if tensors:
            path = files.partial_folder(self._root, self._step) / name
            try:
                save_file(tensors, path)
                files.sync(path)
                digest = file_digest(path)
            except (SafetensorError, OSError) as error:
                # As text: errors travel to the other ranks.
                raise CheckpointWriteError(f"{path}: {error}; free some space or choose another folder") from None
            results.append(WriteResult(MetadataIndex(""), 0, {name: digest}))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        sums: dict[str, str] = {}
        for result in (r for of_rank in results for r in of_rank):
            if result.index.fqn:
                chunks[result.index.fqn].append(result.storage_data)
            else:
                sums.update(result.storage_data)
        absent = [name for name in sums if not (files.partial_folder(self._root, self._step) / name).is_file()]
        if absent:
            raise CheckpointWriteError(
                f"{self._root}: expected a folder that all workers share, found none of {', '.join(absent)} in it, which "
                "other workers wrote"
            )
        tensors = {}
        for name, described in metadata.state_dict_metadata.items():
            assert isinstance(described, TensorStorageMetadata)
            tensors[name] = Stored(described.properties.dtype, tuple(described.size), tuple(chunks[name]))
        manifest = Manifest(self._step, len(results), self._state, tensors, tuple(sums))
        files.publish(self._root, manifest, sums)
        for step in files.steps_in(self._root)[: -self._keep]:
            files.remove(self._root, step)


class _Reader(StorageReader):
    r"""A checkpoint that is being read."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._place = {
            MetadataIndex(name, torch.Size(chunk.offsets)): chunk
            for name, stored in manifest.tensors.items()
            for chunk in stored.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in stored.chunks],
                )
                for name, stored in self._manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        of_file: dict[str, list[tuple[ReadItem, str]]] = defaultdict(list)
        for item in plan.items:
            chunk = self._place[item.storage_index]
            of_file[chunk.file].append((item, chunk.key))
        for name, items in of_file.items():
            try:
                with safe_open(self._folder / name, framework="pt") as file:
                    for item, key in items:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(_rows(file, key, item))
                        planner.commit_tensor(item, target)
            except SafetensorError as error:
                raise CheckpointError(f"{self._folder / name}: {error}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _rows(file: Any, key: str, item: ReadItem) -> Tensor:
    if not item.lengths:
        return file.get_tensor(key)
    box = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
    rows: Tensor = file.get_slice(key)[box]
    return rows
