r"""Checkpoints that are damaged, forged or cannot be written."""

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

import pytest
import torch
from small_training import Training, kept, three_steps

from partpar.errors import (
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
)
from partpar.training import Checkpointer, checkpoint_files, checkpoint_storage
from partpar.training.checkpoint_files import MANIFEST, MARKER, open_checkpoint, steps_in


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
