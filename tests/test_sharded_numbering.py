r"""Rows that live with the nodes of a partition are taken back by the ids of that partition only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from gang import Gang, Worker
from graphs import directed_graph

from partpar import GraphData
from partpar.errors import CheckpointError
from partpar.sharded import DistEmbedding, DistTensor, Normal, policy
from partpar.training import Checkpointer

NUM_NODES = 60


def table_and_tensor(worker: Worker, root: Path, algorithm: str | None) -> tuple[DistEmbedding, DistTensor]:
    share = None
    if algorithm is not None:
        share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    table = DistEmbedding(NUM_NODES, 2, f"table {algorithm}", Normal(seed=3), part_policy=share)
    return table, DistTensor((NUM_NODES, 2), name=f"tensor {algorithm}", part_policy=share)


def save(worker: Worker, root: Path, algorithm: str | None) -> None:
    table, tensor = table_and_tensor(worker, root, algorithm)
    dcp.save({"table": table.state_dict(), "tensor": tensor.state_dict()}, checkpoint_id=root / "dcp")
    with Checkpointer(root / "kept", {"table": table}, worker.group) as checkpoints:
        checkpoints.save(1, force=True)


def load(worker: Worker, root: Path, algorithm: str | None) -> list[str]:
    r"""Returns what is wrong with the rows of a table, of a tensor and of a checkpoint."""
    table, tensor = table_and_tensor(worker, root, algorithm)
    state: dict[str, Any] = {"table": table.state_dict(), "tensor": tensor.state_dict()}
    dcp.load(state, checkpoint_id=root / "dcp")
    told = []
    for thing, name in ((table, "table"), (tensor, "tensor")):
        try:
            thing.load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            told.append(str(error))
    with Checkpointer(root / "kept", {"table": table}, worker.group, resume=True) as checkpoints:
        try:
            checkpoints.resume()
        except CheckpointError as error:
            told.append(str(error))
    return told


def forget_the_numbering(worker: Worker, root: Path, algorithm: str | None) -> list[str]:
    r"""A mutant: ids of all partitions are taken to mean the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_numbering", lambda share: 0)
        if worker.world_size == 2:
            return load(worker, root, algorithm)
        save(worker, root, algorithm)
    return []


def test_mutant_is_noticed(gang: Gang, tmp_path: Path) -> None:
    for parts in (3, 2):
        GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, parts)
        told = gang.run(forget_the_numbering, parts, tmp_path, "metis")
    assert told == [[], []], "what the test below awaits is told by the numbering alone"


@pytest.mark.parametrize(
    ("saved", "loaded", "hands", "fits"),
    [
        ("metis", "metis", 3, True),
        (None, None, 2, True),
        ("metis", "metis", 2, False),
        ("metis", "random", 3, False),
        ("metis", None, 2, False),
        (None, "metis", 2, False),
    ],
)
def test_rows_of_another_partition_are_refused(
    gang: Gang, tmp_path: Path, saved: str | None, loaded: str | None, hands: int, fits: bool
) -> None:
    for algorithm, parts in {(saved, 3), (loaded, hands)}:
        if algorithm is not None:
            GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, parts, algorithm=algorithm)
    gang.run(save, 3, tmp_path, saved)
    for told in gang.run(load, hands, tmp_path, loaded):
        assert len(told) == (0 if fits else 3)
        for message in told:
            assert "expected rows by the ids of" in message and "resume on the partition" in message
