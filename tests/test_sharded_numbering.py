r"""Rows that live with the nodes of a partition are taken over by the nodes of another, and never by its ids as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from gang import Gang, Worker
from graphs import directed_graph
from torch import Tensor

from partpar import GraphData
from partpar.errors import CheckpointError
from partpar.sharded import DistEmbedding, DistTensor, Normal, SparseAdagrad, edge_policy
from partpar.training import Checkpointer

NUM_NODES, NUM_EDGES = 60, 275
Things = dict[str, Any]


def make(worker: Worker, root: Path, algorithm: str | None) -> tuple[Things, Tensor, Tensor]:
    r"""A table, its optimiser, tensors of nodes and of edges; and what this worker's rows are known by from anywhere."""
    share, nodes, edges = None, None, None
    if algorithm is not None:
        share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
        nodes, edges = share.node()["raw_ids"], edge_policy(share, group=worker.group)
    table = DistEmbedding(NUM_NODES, 2, f"table {algorithm}", Normal(seed=3), part_policy=share)
    of_nodes = DistTensor((NUM_NODES, 2), torch.int16, name=f"nodes {algorithm}", part_policy=share)
    of_edges = DistTensor((NUM_EDGES,), name=f"edges {algorithm}", part_policy=edges)
    things = {"table": table, "sparse": SparseAdagrad([table], lr=1.0), "nodes": of_nodes, "edges": of_edges}
    known = of_nodes.local_ids if nodes is None else nodes
    return things, known, of_edges.local_ids if share is None else share.edge()["raw_ids"]


def rows_of(things: Things) -> dict[str, Tensor]:
    r"""All rows that there are here."""
    sums = things["sparse"].state[0]["sum"]
    return {"table": things["table"].weight.local_rows, "sparse": sums, "nodes": things["nodes"].local_rows}


def save(worker: Worker, root: Path, algorithm: str | None) -> None:
    things, known, edges = make(worker, root, algorithm)
    for width, rows in enumerate(rows_of(things).values()):
        rows[:] = known.unsqueeze(1) + 100 * width
    things["edges"].local_rows[:] = edges.float()
    dcp.save({name: thing.state_dict() for name, thing in things.items()}, checkpoint_id=root / "dcp")
    with Checkpointer(root / "kept", things, worker.group) as checkpoints:
        checkpoints.save(1, force=True)


def load(worker: Worker, root: Path, algorithm: str | None, way: str) -> str | None:
    r"""Returns what is wrong, if rows are not taken; those taken must be their own nodes'."""
    things, known, edges = make(worker, root, algorithm)
    try:
        if way == "dcp":
            state = {name: thing.state_dict() for name, thing in things.items()}
            dcp.load(state, checkpoint_id=root / "dcp")
            for name, thing in things.items():
                thing.load_state_dict(state[name])
        else:
            with Checkpointer(root / "kept", things, worker.group, resume=True) as checkpoints:
                checkpoints.resume()
    except (RuntimeError, ValueError, CheckpointError) as error:
        return str(error)
    for width, (name, rows) in enumerate(rows_of(things).items()):
        assert torch.equal(rows, (known.unsqueeze(1) + 100 * width).expand(-1, 2).to(rows.dtype)), name
    assert torch.equal(things["edges"].local_rows, edges.float())
    return None


def cut(root: Path, *partitions: tuple[str | None, int]) -> None:
    for algorithm, parts in set(partitions):
        if algorithm is not None:
            GraphData.from_pyg_data(directed_graph()).partition_graph(root, parts, algorithm=algorithm)


@pytest.mark.parametrize("way", ["dcp", "checkpointer"])
@pytest.mark.parametrize(
    ("saved", "loaded", "hands"),
    [("metis", "metis", 3), (None, None, 2), ("metis", "metis", 2), ("metis", "random", 4), ("random", "metis", 1)],
)
def test_rows_stay_with_their_nodes(
    gang: Gang, tmp_path: Path, saved: str | None, loaded: str | None, hands: int, way: str
) -> None:
    cut(tmp_path, (saved, 3), (loaded, hands))
    gang.run(save, 3, tmp_path, saved)
    assert gang.run(load, hands, tmp_path, loaded, way) == [None] * hands


@pytest.mark.parametrize(
    ("saved", "loaded", "way"), [("metis", None, "dcp"), ("metis", None, "checkpointer"), (None, "metis", "checkpointer")]
)
def test_rows_whose_nodes_are_not_known_are_refused(
    gang: Gang, tmp_path: Path, saved: str | None, loaded: str | None, way: str
) -> None:
    cut(tmp_path, (saved, 3), (loaded, 2))
    gang.run(save, 3, tmp_path, saved)
    for told in gang.run(load, 2, tmp_path, loaded, way):
        assert told is not None and "expected rows by the ids of" in told


def forget_the_meaning(worker: Worker, root: Path) -> None:
    r"""A mutant: ids of all partitions are taken to mean the same."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("embedding", "tensor", "optim"):
            patch.setattr(f"partpar.sharded.{module}.way_from", lambda state, shard, group: None)
        load(worker, root, "metis", "dcp")


def test_mutant_is_noticed(gang: Gang, tmp_path: Path) -> None:
    cut(tmp_path, ("metis", 3), ("metis", 2))
    gang.run(save, 3, tmp_path, "metis")
    for error in gang.run_expecting_errors(forget_the_meaning, 2, tmp_path):
        assert error is not None and error[0] == "AssertionError"
