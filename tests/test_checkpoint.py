r"""Checkpoints: nothing of a training's state is lost, and nothing that is not whole is taken for one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import directed_graph
from small_training import Training, three_steps
from torch import Tensor

from partpar import GraphData
from partpar.errors import (
    CheckpointError,
    DamagedCheckpointError,
    SamplingError,
)
from partpar.sampling import DistNeighborLoader
from partpar.training import Checkpointer, add_checkpoint_arguments, checkpoint_storage, open_checkpoints
from partpar.training.checkpoint_files import steps_in
from partpar.training.state_tree import join, split

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


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


def test_who_resumes_says_where() -> None:
    parser = argparse.ArgumentParser()
    add_checkpoint_arguments(parser)
    with pytest.raises(CheckpointError, match="--resume: expected --checkpoint-dir"):
        open_checkpoints(parser.parse_args(["--resume"]), Training().state)
    with open_checkpoints(parser.parse_args([]), Training().state) as checkpoints:
        assert checkpoints.resume() is None


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
