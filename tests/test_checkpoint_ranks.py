r"""Checkpoints of several workers: onto other numbers of them, and what each is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import Gang
from small_training import Training, three_steps
from torch import Tensor

from partpar.errors import (
    AgreementError,
    CheckpointError,
    CheckpointWriteError,
    PartparError,
)
from partpar.sharded import DistEmbedding, SparseAdam
from partpar.training import Checkpointer, checkpoint_files, checkpoint_storage
from partpar.training.checkpoint_files import steps_in


def _rows_of(worker: Any, offsets: list[int]) -> tuple[DistEmbedding, SparseAdam, torch.nn.Linear, torch.optim.Adam]:
    table = DistEmbedding(offsets[-1], 3, part_policy=offsets, dtype=torch.float64)
    model = torch.nn.Linear(3, 1).double()
    return table, SparseAdam([table], lr=0.1), model, torch.optim.Adam(model.parameters())


def _step(table: DistEmbedding, sparse: SparseAdam, worker: Any) -> None:
    ids = torch.arange(table.num_embeddings)[worker.rank :: worker.world_size]
    (table(ids) * (ids[:, None] + 1.0)).square().sum().backward()
    sparse.step()
    with torch.no_grad():
        table.weight.local_rows.add_(table.weight.local_ids[:, None] * 0.25)


def save_rows(worker: Any, folder: Path, offsets: list[int]) -> tuple[Tensor, Tensor]:
    table, sparse, model, dense = _rows_of(worker, offsets)
    state = {"table": table, "sparse": sparse, "model": model, "dense": dense}
    with Checkpointer(folder, state, worker.group) as checkpoints:
        for step in (1, 2):
            _step(table, sparse, worker)
            model(torch.ones(1, 3).double()).sum().backward()
            dense.step()
            checkpoints.save(step)
        _step(table, sparse, worker)
        checkpoints.wait()
    everything = torch.arange(offsets[-1])
    return table(everything).detach(), model.weight.detach().clone()


def load_rows(worker: Any, folder: Path, offsets: list[int]) -> tuple[Tensor, Tensor, int]:
    table, sparse, model, dense = _rows_of(worker, offsets)
    state = {"table": table, "sparse": sparse, "model": model, "dense": dense}
    with Checkpointer(folder, state, worker.group, resume=True) as checkpoints:
        assert checkpoints.resume() == {}
    _step(table, sparse, worker)
    return table(torch.arange(offsets[-1])).detach(), model.weight.detach().clone(), int(torch.randint(2**40, (1,)))


@pytest.mark.parametrize(
    "saved", [[0, 4, 4, 11], *(pytest.param(offsets, marks=pytest.mark.soak) for offsets in ([0, 0, 11], [0, 11]))]
)
def test_another_number_of_workers_goes_on(gang: Gang, tmp_path: Path, saved: list[int]) -> None:
    rows, weight = gang.run(save_rows, len(saved) - 1, tmp_path, saved)[0]
    for offsets in ([0, 11], [0, 6, 11], [0, 0, 9, 11], [0, 2, 4, 8, 11]):
        told = gang.run(load_rows, len(offsets) - 1, tmp_path, offsets)
        for found, dense, _ in told:
            assert torch.allclose(found, rows, rtol=1e-12, atol=0)
            assert torch.equal(dense, weight)
        assert len({draw for *_, draw in told}) >= len(offsets) - len(saved) + 1, "new ranks draw for themselves"


def write_on_a_full_disk(worker: Any, folder: Path) -> list[int]:
    training = Training()
    with Checkpointer(folder, training.state, worker.group, asynchronous=False) as checkpoints:
        checkpoints.save(1)
        if worker.rank == worker.world_size - 1:
            keep, checkpoint_storage.save_file = checkpoint_storage.save_file, _full  # type: ignore[assignment]
        with pytest.raises(CheckpointWriteError, match=f"rank {worker.world_size - 1}: .*No space left on device"):
            checkpoints.save(2)
        if worker.rank == worker.world_size - 1:
            checkpoint_storage.save_file = keep
        checkpoints.save(3)
    return steps_in(folder)


def _full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_every_rank_is_told_of_a_full_disk(gang: Gang, tmp_path: Path) -> None:
    assert gang.run(write_on_a_full_disk, 3, tmp_path) == [[1, 3]] * 3


def damaged_for_one(worker: Any, folder: Path) -> int:
    training = Training()
    with Checkpointer(folder, training.state, worker.group, resume=True) as checkpoints:
        checkpoints.resume()
        return checkpoints.step


def save_thrice(worker: Any, folder: Path) -> None:
    three_steps(folder, group=worker.group)


def test_all_ranks_pass_over_what_one_finds_damaged(gang: Gang, tmp_path: Path) -> None:
    gang.run(save_thrice, 2, tmp_path)
    file = checkpoint_files.final_folder(tmp_path, 3) / "001.safetensors"  # which rank 1 compares
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert gang.run(damaged_for_one, 2, tmp_path) == [2, 2]


def disagree(worker: Any, folder: Path) -> None:
    with Checkpointer(folder, Training().state, worker.group) as checkpoints:
        checkpoints.save(1, best=worker.rank)


def test_ranks_that_differ_are_told(gang: Gang, tmp_path: Path) -> None:
    for told in gang.run_expecting_errors(disagree, 2, tmp_path):
        assert told is not None
        assert told[0] == AgreementError.__name__
        assert "save of step 1: ranks disagree on state" in told[1]
    assert steps_in(tmp_path) == []


def refused(worker: Any, folder: Path) -> None:
    Checkpointer(folder, Training().state, worker.group)


def test_all_ranks_refuse_a_folder_that_is_not_to_be_resumed(gang: Gang, tmp_path: Path) -> None:
    gang.run(save_thrice, 1, tmp_path)
    for told in gang.run_expecting_errors(refused, 3, tmp_path):
        assert told is not None
        assert told[0] == CheckpointError.__name__
    assert issubclass(CheckpointError, PartparError)
