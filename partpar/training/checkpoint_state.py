r"""From objects to what a checkpoint keeps of them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partpar.errors import CheckpointError, DamagedCheckpointError
from partpar.sharded.checkpoint import ShardedRows
from partpar.training.checkpoint_files import Manifest
from partpar.training.random_state import draw_apart, random_state, set_random_state
from partpar.training.state_tree import join, split, tensors_of

VALUES, RANDOM = "values", "random"  # what is kept beside the objects


def collect(things: Mapping[str, Any], values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    r"""The state of objects, and values: ``(what JSON can carry, tensors by name)``; tensors are those in use, no copies.

    Raises:
        CheckpointError: There is something else in a state.
    """
    tensors: dict[str, Tensor] = {}
    states = {name: _state_of(thing) for name, thing in things.items()} | {VALUES: values}
    return {name: split(state, name, tensors) for name, state in states.items()}, tensors


def drawn_by(rank: int) -> dict[str, Tensor]:
    r"""The state of this rank's generators, by name."""
    return {f"{RANDOM}/{rank}/{name}": value for name, value in random_state().items()}


def wanted(things: Mapping[str, Any], manifest: Manifest, rank: int) -> dict[str, Tensor]:
    r"""The tensors to fill from a checkpoint: the rows in use of what is sharded, new ones of all else.

    Raises:
        CheckpointError: It is of other objects, or of other rows.
    """
    expected, found = sorted([*things, VALUES]), sorted(manifest.state)
    if expected != found:
        raise CheckpointError(f"expected the state of {', '.join(expected)}, found that of {', '.join(found)}")
    in_use = collect(things, {})[1]
    names = tensors_of(list(manifest.state.values())) | _random_names(manifest, rank)
    if not names <= set(manifest.tensors):
        raise DamagedCheckpointError(f"expected the tensor {min(names - set(manifest.tensors))!r}, found none")
    into: dict[str, Tensor] = {}
    for name in sorted(names):
        stored, there = manifest.tensors[name], in_use.get(name)
        if not isinstance(there, ShardedRows):
            into[name] = torch.empty(stored.shape, dtype=stored.dtype)
        elif tuple(there.shape) == stored.shape and there.dtype == stored.dtype:
            into[name] = there
        else:
            raise CheckpointError(
                f"{name}: expected {there.dtype} of shape {tuple(there.shape)}, found {stored.dtype} of shape {stored.shape}"
            )
    return into


def hand_out(things: Mapping[str, Any], manifest: Manifest, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    r"""Gives objects and generators the state of a checkpoint, whose tensors are filled; returns the values.

    Raises:
        CheckpointError: An object does not take its state.
    """
    for name, thing in things.items():
        try:
            _load_state(thing, join(manifest.state[name], tensors))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{name}: expected a state that fits it, found one that does not: {error}") from error
    names = _random_names(manifest, rank)
    set_random_state({name.rpartition("/")[2]: tensors[name] for name in names})
    if rank >= manifest.world_size:
        draw_apart(rank)
    values: dict[str, Any] = join(manifest.state[VALUES], tensors)
    return values


def _random_names(manifest: Manifest, rank: int) -> set[str]:
    """A rank that was none when the state was kept begins with another's."""
    prefix = f"{RANDOM}/{rank % manifest.world_size}/"
    return {name for name in manifest.tensors if name.startswith(prefix)}


def _state_of(thing: Any) -> Any:
    return {"generator": thing.get_state()} if isinstance(thing, torch.Generator) else thing.state_dict()


def _load_state(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state["generator"])
        return
    if isinstance(thing, torch.nn.Module):
        versioned = thing.state_dict()  # layers ask it which version of theirs wrote it
        versioned.clear()
        versioned.update(state)
        state = versioned
    thing.load_state_dict(state)
