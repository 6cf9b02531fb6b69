r"""Mistakes put into checkpoints on purpose; the comparisons of ``test_checkpoint*.py`` must notice each. Listed in
``MUTANTS.rst``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_training
import test_checkpoint
import test_checkpoint_damage
import test_checkpoint_ranks
import torch
from gang import Gang, GangError
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from partpar.sampling import DistNeighborLoader
from partpar.sharded.checkpoint import ShardedRows
from partpar.training import Checkpointer, checkpoint_files, checkpoint_state
from partpar.training.checkpoint_files import final_folder, open_checkpoint, partial_folder, steps_in

Patch = pytest.MonkeyPatch


def _but_for(patch: Patch, kind: type, change: Callable[[Any], Any]) -> None:
    """Has objects of a kind take another state over."""
    load = checkpoint_state._load_state
    patch.setattr(
        checkpoint_state, "_load_state", lambda thing, state: load(thing, change(state) if isinstance(thing, kind) else state)
    )


def forget_the_optimizer(patch: Patch) -> None:
    _but_for(patch, torch.optim.Optimizer, lambda state: {**state, "state": {}})


def forget_the_schedule(patch: Patch) -> None:
    _but_for(patch, torch.optim.lr_scheduler.LRScheduler, lambda state: {**state, "last_epoch": 0})


def forget_the_steps_of_dropout(patch: Patch) -> None:
    zero = torch.zeros((), dtype=torch.int64)
    _but_for(patch, torch.nn.Module, lambda state: {k: zero if k.endswith("step") else v for k, v in state.items()})


def forget_the_generators(patch: Patch) -> None:
    patch.setattr(checkpoint_state, "set_random_state", lambda state: None)


def write_what_is_in_use(patch: Patch) -> None:
    patch.setattr(Checkpointer, "_copy", lambda self, name, tensor: tensor)


class _Same(str):
    """A checksum that is as expected."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def compare_no_checksums(patch: Patch) -> None:
    digest = checkpoint_files.file_digest
    patch.setattr(checkpoint_files, "file_digest", lambda path: _Same(digest(path)))


def rename_before_the_marker(patch: Patch) -> None:
    publish = checkpoint_files.publish

    def mutant(root: Path, manifest: Any, sums: dict[str, str]) -> None:
        os.rename(partial_folder(root, manifest.step), final_folder(root, manifest.step))
        with Patch.context() as within:  # what cleans up afterwards is as it was
            within.setattr(checkpoint_files, "partial_folder", final_folder)
            publish(root, manifest, sums)

    patch.setattr(checkpoint_files, "publish", mutant)


def remove_in_place(patch: Patch) -> None:
    patch.setattr(checkpoint_files, "remove", lambda root, step: checkpoint_files.shutil.rmtree(final_folder(root, step)))


def begin_the_epoch_anew(patch: Patch) -> None:
    load = DistNeighborLoader.load_state_dict
    patch.setattr(DistNeighborLoader, "load_state_dict", lambda self, state: load(self, {**state, "batch": 0}))


def stay_in_the_epoch(patch: Patch) -> None:
    state_dict = DistNeighborLoader.state_dict
    patch.setattr(DistNeighborLoader, "state_dict", lambda self: {**state_dict(self), "epoch": self.epoch})


def cut_short(tmp_path: Path) -> None:
    r"""A checkpoint that ends before its marker is none."""

    def ended(sums: dict[str, str]) -> str:
        raise OSError("the end")

    with Checkpointer(tmp_path, {}, asynchronous=False) as checkpoints, Patch.context() as patch:
        patch.setattr(checkpoint_files, "_marker", ended)
        with pytest.raises(OSError, match="the end"):
            checkpoints.save(1)
        assert steps_in(tmp_path) == []


def ended_while_removing(tmp_path: Path) -> None:
    r"""Of a checkpoint that is being removed, no half stands under its name."""
    small_training.three_steps(tmp_path)
    remove_all = shutil.rmtree

    def half(path: Path, **options: Any) -> None:
        for file in sorted(Path(path).iterdir())[1:] if Path(path).exists() else []:
            file.unlink()
        if list(path.glob("*")):
            raise OSError("the end")

    with Patch.context() as patch:
        patch.setattr(checkpoint_files.shutil, "rmtree", half)
        with pytest.raises(OSError, match="the end"):
            checkpoint_files.remove(tmp_path, 1)
    assert remove_all is shutil.rmtree
    for step in steps_in(tmp_path):
        open_checkpoint(tmp_path, step)


def loader_goes_on(tmp_path: Path) -> None:
    test_checkpoint.test_a_loader_goes_on_within_an_epoch(0)


def writes_what_was_saved(tmp_path: Path) -> None:
    with Patch.context() as patch:
        test_checkpoint.test_what_is_written_is_what_was_saved(tmp_path, patch)


RESUMED = test_checkpoint.test_a_resumed_training_ends_as_one_that_never_stopped
COMPARISONS: dict[Callable[[Patch], None], Callable[[Path], None]] = {
    **dict.fromkeys((forget_the_optimizer, forget_the_schedule, forget_the_steps_of_dropout, forget_the_generators), RESUMED),
    write_what_is_in_use: writes_what_was_saved,
    compare_no_checksums: test_checkpoint_damage.test_no_single_byte_goes_unnoticed,
    rename_before_the_marker: cut_short,
    remove_in_place: ended_while_removing,
    begin_the_epoch_anew: loader_goes_on,
    stay_in_the_epoch: loader_goes_on,
}


@pytest.mark.parametrize("mutant", COMPARISONS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_noticed(mutant: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch) -> None:
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        mutant(monkeypatch)
        COMPARISONS[mutant](tmp_path)


@pytest.mark.parametrize("compare", [cut_short, ended_while_removing, writes_what_was_saved], ids=lambda c: c.__name__)
def test_comparisons_pass_without(compare: Callable[[Path], None], tmp_path: Path) -> None:
    compare(tmp_path)


# --- several workers ------------------------------------------------------------------------------------------------


def rows_begin_at_0(patch: Patch) -> None:
    def mutant(self: ShardedRows) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([0] * self.dim()), self.local.shape)

    patch.setattr(ShardedRows, "_chunk", mutant)


def load_with_a_mistake(worker: Any, folder: Path, offsets: list[int]) -> Any:
    with Patch.context() as patch:
        rows_begin_at_0(patch)
        return test_checkpoint_ranks.load_rows(worker, folder, offsets)


def test_rows_of_another_place_are_noticed(gang: Gang, tmp_path: Path) -> None:
    rows, _ = gang.run(test_checkpoint_ranks.save_rows, 2, tmp_path, [0, 5, 11])[0]
    found = gang.run(test_checkpoint_ranks.load_rows, 3, tmp_path, [0, 2, 9, 11])[0][0]
    assert torch.allclose(found, rows, rtol=1e-12, atol=0)
    try:
        found = gang.run(load_with_a_mistake, 3, tmp_path, [0, 2, 9, 11])[0][0]
    except GangError:
        return
    assert not torch.allclose(found, rows)
