r"""Checkpoints: nothing of a training's state is lost, and nothing that is not whole is taken for one."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang
from graphs import directed_graph
from torch import Tensor

from partpar import GraphData
from partpar.errors import (
    AgreementError,
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
    PartparError,
    SamplingError,
)
from partpar.nn import Dropout
from partpar.sampling import DistNeighborLoader
from partpar.sharded import DistEmbedding, SparseAdam
from partpar.training import Checkpointer, checkpoint_files, checkpoint_storage
from partpar.training.checkpoint_files import MANIFEST, MARKER, open_checkpoint, steps_in
from partpar.training.state_tree import join, split

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Training:
    r"""A small training that draws from everything that a checkpoint has to keep."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what others draw from
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), Dropout(0.5, seed=1, layer=0), torch.nn.Dropout(0.2),
            torch.nn.Linear(8, 1),
        ).double()  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], 0.5)
        self.draw = torch.Generator().manual_seed(seed)

    @property
    def state(self) -> dict[str, Any]:
        names = ("model", "optimizer", "schedule", "draw")
        return {name: getattr(self, name) for name in names}

    def step(self) -> float:
        x = torch.randn(16, 4, generator=self.draw, dtype=torch.float64) + random.random()
        x = x + np.random.rand()  # noqa: NPY002
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean() + torch.rand(()).double()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def kept(folder: Path, **options: Any) -> list[int]:
    with Checkpointer(folder, Training().state, resume=True, **options):
        pass
    return steps_in(folder)


def three_steps(folder: Path, **options: Any) -> None:
    training = Training()
    with Checkpointer(folder, training.state, **options) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, loss=training.step())


def test_a_resumed_training_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole = Training()
    losses = [whole.step() for _ in range(6)]
    first = Training()
    with Checkpointer(tmp_path, first.state) as checkpoints:
        done = [first.step() for _ in range(3)]
        checkpoints.save(3, losses=done, best=None)
        first.step()  # what comes after is not kept
    again = Training(seed=9)
    with Checkpointer(tmp_path, again.state, resume=True) as checkpoints:
        found = checkpoints.resume()
        assert found == {"losses": done, "best": None}
        assert checkpoints.step == 3
        assert done + [again.step() for _ in range(3)] == losses
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_what_is_written_is_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, write = [], checkpoint_storage.write

    def late(*args: Any) -> None:
        held.append(args)

    monkeypatch.setattr(checkpoint_storage, "write", late)
    x = torch.nn.Parameter(torch.zeros(3))
    module = torch.nn.ParameterDict({"x": x})
    with Checkpointer(tmp_path, {"module": module}) as checkpoints:
        checkpoints.save(1)
        checkpoints.wait()
        with torch.no_grad():
            x.fill_(7)  # the training goes on before anything is written
        write(*held[0])
    with Checkpointer(tmp_path, {"module": module}, resume=True) as checkpoints:
        checkpoints.resume()
    assert x.tolist() == [0, 0, 0]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    training = Training()
    with Checkpointer(tmp_path, training.state, keep=2, every=2) as checkpoints:
        assert [checkpoints.save(step) for step in range(1, 8)] == [False, True] * 3 + [False]
        assert checkpoints.save(7, force=True)
    assert steps_in(tmp_path) == [6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_0000000006", "step_0000000007"]


def test_nothing_is_kept_without_a_folder() -> None:
    with Checkpointer(None, Training().state) as checkpoints:
        assert checkpoints.resume() is None
        assert not checkpoints.save(1)


def test_mistakes_are_told(tmp_path: Path) -> None:
    training = Training()
    for options in ({"keep": 0}, {"every": 0}, {"state": {"values": training.model}}, {"state": {"a/b": training.model}}):
        with pytest.raises(CheckpointError, match=r"expected .* found"):
            Checkpointer(tmp_path, **options)
    three_steps(tmp_path)
    with pytest.raises(CheckpointError, match=r"found them up to step 3; go on from there with resume=True"):
        Checkpointer(tmp_path, training.state)
    with Checkpointer(tmp_path, training.state, resume=True) as checkpoints:
        with pytest.raises(CheckpointError, match=r"expected a folder that no other run writes to"):
            Checkpointer(tmp_path, training.state, resume=True)
        with pytest.raises(CheckpointError, match=r"expected resume\(\) before the first save"):
            checkpoints.save(9)
        checkpoints.resume()
        with pytest.raises(CheckpointError, match=r"expected a step after 3, found 3"):
            checkpoints.save(3)
        with pytest.raises(CheckpointError, match=r"values/odd/1: expected tensors, numbers, strings.*found function"):
            checkpoints.save(4, odd=[1, print_nothing])
    with Checkpointer(tmp_path, {"model": training.model}, resume=True) as checkpoints, pytest.raises(
        CheckpointError, match=r"expected the state of model, values, found that of draw, model, optimizer, schedule"
    ):
        checkpoints.resume()
    other = {**training.state, "model": torch.nn.Linear(4, 2)}
    with Checkpointer(tmp_path, other, resume=True) as checkpoints, pytest.raises(CheckpointError, match=r"model: expected"):
        checkpoints.resume()
    assert steps_in(tmp_path) == [1, 2, 3]


def print_nothing() -> None: ...


def test_states_are_split_and_joined() -> None:
    state = {"a": [1, (2.5, None), {0: torch.arange(3), "x": True}], 7: "text", "inf": float("inf")}
    tensors: dict[str, Tensor] = {}
    raw = split(state, "s", tensors)
    assert list(tensors) == ["s/a/2/0"]
    assert join(raw, tensors) == state
    for strange in ({"tensor": "none"}, {"tuple": 3}, {"dict": [[1, 2, 3]]}, {"dict": [[[], 2]]}, {"a": 1, "b": 2}, {}):
        with pytest.raises(DamagedCheckpointError):
            join(strange, tensors)
    with pytest.raises(CheckpointError, match="rename a key"):
        split({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "s", {})


# --- what is damaged ------------------------------------------------------------------------------------------------


def test_no_single_byte_goes_unnoticed(tmp_path: Path) -> None:
    three_steps(tmp_path, keep=1)
    folder, draw = checkpoint_files.final_folder(tmp_path, 3), random.Random(0)
    for name in (MANIFEST, MARKER, "000.safetensors"):
        content = (folder / name).read_bytes()
        for number in range(200):
            place = draw.randrange(len(content))
            if number % 2:
                changed = content[:place]
            else:
                changed = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
            (folder / name).write_bytes(changed)
            with pytest.raises(DamagedCheckpointError):
                open_checkpoint(tmp_path, 3)
        (folder / name).write_bytes(content)
    assert open_checkpoint(tmp_path, 3).step == 3


@pytest.mark.parametrize("name", [MANIFEST, MARKER, "000.safetensors"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str) -> None:
    three_steps(tmp_path)
    (checkpoint_files.final_folder(tmp_path, 3) / name).unlink()
    training = Training()
    with Checkpointer(tmp_path, training.state, resume=True) as checkpoints:
        with pytest.warns(UserWarning, match="passed over the checkpoint of step 3"):
            assert checkpoints.resume() is not None
        assert checkpoints.step == 2
        training.step()
        checkpoints.save(3)  # again
    assert steps_in(tmp_path) == [1, 2, 3]
    assert open_checkpoint(tmp_path, 3).step == 3
    assert (tmp_path / "step_0000000003.damaged").is_dir()


def test_without_a_whole_one_nothing_begins_anew(tmp_path: Path) -> None:
    three_steps(tmp_path, keep=2)
    for step in (2, 3):
        (checkpoint_files.final_folder(tmp_path, step) / MARKER).write_text("")
    for _ in range(2):
        with Checkpointer(tmp_path, Training().state, resume=True) as checkpoints, pytest.warns(
            UserWarning, match="passed over"
        ), pytest.raises(DamagedCheckpointError, match="found 2 damaged ones"):
            checkpoints.resume()


def test_manifests_lead_nowhere_else(tmp_path: Path) -> None:
    three_steps(tmp_path, keep=1)
    folder = checkpoint_files.final_folder(tmp_path, 3)
    good = (folder / MANIFEST).read_text()
    for old, new in (
        ('"000.safetensors"', '"../000.safetensors"'), ('"float64"', '"load"'), ('"step": 3', '"step": 4'),
        ('"format_version": 1', '"format_version": "x"'), ("[8, 4]", "[800000000, 4]"), ("[8, 4]", "[8, -4]"),
        ('"partpar-checkpoint"', '"another"'), ('"files"', '"flies"'),
    ):  # fmt: skip
        assert old in good
        _forge(folder, good.replace(old, new))
        with pytest.raises(DamagedCheckpointError):
            open_checkpoint(tmp_path, 3)
    _forge(folder, good.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="upgrade partpar"):
        open_checkpoint(tmp_path, 3)
    _forge(folder, "[" * 100_000)
    with pytest.raises(DamagedCheckpointError):
        open_checkpoint(tmp_path, 3)
    _forge(folder, good)
    open_checkpoint(tmp_path, 3)
    elsewhere = tmp_path / "elsewhere"
    (folder / "000.safetensors").rename(elsewhere)
    (folder / "000.safetensors").symlink_to(elsewhere)
    with pytest.raises(DamagedCheckpointError, match="found a link"):
        open_checkpoint(tmp_path, 3)
    folder.rename(tmp_path / "real")
    folder.symlink_to(tmp_path / "real")
    assert steps_in(tmp_path) == []


def _forge(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    lines = (folder / MARKER).read_text().splitlines()
    lines[0] = f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}"
    (folder / MARKER).write_text("\n".join(lines) + "\n")


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_steps(tmp_path)
    folder = checkpoint_files.final_folder(tmp_path, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["000.safetensors", MARKER, MANIFEST]
    done = subprocess.run(["sha256sum", "--check", "--strict", MARKER], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    with Checkpointer(tmp_path, Training().state, resume=True) as checkpoints:
        assert checkpoints.resume() is not None


def test_what_a_killed_run_left_behind_goes(tmp_path: Path) -> None:
    three_steps(tmp_path)
    shutil.copytree(checkpoint_files.final_folder(tmp_path, 3), checkpoint_files.partial_folder(tmp_path, 4))
    (tmp_path / ".step_0000000001.old").mkdir()
    (tmp_path / "mine").mkdir()
    assert kept(tmp_path) == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir() if "step_" not in path.name) == [".lock", "mine"]
    assert not list(tmp_path.glob(".step*"))


# --- what cannot be written -----------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, timeout=60)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system that is soon full")
    try:
        module = torch.nn.Linear(10, 10)
        module.register_buffer("more", torch.zeros(10))
        with Checkpointer(disk, {"module": module}) as checkpoints:
            checkpoints.save(1)
            module.more = torch.zeros(100_000)
            checkpoints.save(2)
            with pytest.raises(CheckpointWriteError, match=r"step 2 was not written: .*No space left on device"):
                checkpoints.wait()
            assert steps_in(disk) == [1]
            assert open_checkpoint(disk, 1).step == 1
            assert not list(disk.glob(".step*"))
            module.more = torch.zeros(10)
            checkpoints.save(3)  # the training may go on
        assert steps_in(disk) == [1, 3]
    finally:
        subprocess.run(["umount", disk], check=True, timeout=60)


@pytest.mark.parametrize("place", ["save_file", "publish", "sync"])
def test_whatever_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    training = Training()
    with Checkpointer(tmp_path, training.state, asynchronous=False) as checkpoints:
        checkpoints.save(1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_storage if place == "save_file" else checkpoint_files, place, full)
            with pytest.raises(CheckpointWriteError, match="No space left on device"):
                checkpoints.save(2)
        checkpoints.save(3)
    assert steps_in(tmp_path) == [1, 3]


# --- loaders --------------------------------------------------------------------------------------------------------


def _loader(**options: Any) -> DistNeighborLoader:
    graph = GraphData.from_pyg_data(directed_graph())
    return DistNeighborLoader(graph, [3, 2], batch_size=7, shuffle=True, **{"seed": 5, **options})


def _ids(batches: Any) -> list[list[int]]:
    return [batch.n_id.tolist() for batch in batches]


@pytest.mark.parametrize("concurrency", [0, 2])
def test_a_loader_goes_on_within_an_epoch(concurrency: int) -> None:
    with _loader(concurrency=concurrency) as loader:
        epochs = [_ids(loader) for _ in range(3)]
        assert loader.state_dict() == {"epoch": 3, "batch": 0, "steps": len(loader), "seed": 5}
    assert len(epochs[1]) > 3
    with _loader(concurrency=concurrency) as loader:
        _ids(loader)
        reading = iter(loader)
        read = _ids(next(reading) for _ in range(2))
        state = loader.state_dict()
    assert state["epoch"] == 1
    assert state["batch"] == 2
    with _loader(concurrency=concurrency) as loader:
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert read + _ids(loader) == epochs[1]
        assert _ids(loader) == epochs[2]
        reading = iter(loader)
        for _ in range(len(loader)):
            next(reading)
        assert loader.state_dict()["epoch"] == 4, "after its last batch an epoch is over"
    with _loader(seed=6) as other, pytest.raises(SamplingError, match="seed: expected that of the state, 5, found 6"):
        other.load_state_dict(state)
    with _loader(input_nodes=torch.arange(9)) as other, pytest.raises(SamplingError, match="go on with as many workers"):
        other.load_state_dict(state)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_keeps_checkpoints(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert "training.add_checkpoint_arguments(parser" in text
    assert "training.open_checkpoints(args, " in text


# --- several workers ------------------------------------------------------------------------------------------------


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
