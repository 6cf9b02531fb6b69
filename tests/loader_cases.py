r"""Partitions of a small graph, and what batches of loaders over them are compared by."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from gang import Worker
from graphs import directed_graph
from torch import Tensor
from torch_geometric.data import Data

from partpar import GraphData

SEEDS = torch.tensor([7, 0, 44, 50, 21, 3, 58, 12, 33, 9, 51, 54])  # among them sinks, sources and isolated nodes


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> str:
    r"""The odd graph in 1 to 4 parts, and in two of which one is empty."""
    root = tmp_path_factory.mktemp("loader")
    graph = GraphData.from_pyg_data(directed_graph())
    for num_parts in (1, 2, 3, 4):
        graph.partition_graph(root, num_parts, algorithm="random")
    empty = {"assignment": torch.zeros(60, dtype=torch.int64)}
    graph.partition_graph(root / "empty", 2, algorithm="given", partition_kwargs=empty)
    return str(root)


def open_share(worker: Worker, root: str, algorithm: str = "random") -> GraphData:
    return GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)


def columns(batch: Data) -> dict[str, Tensor]:
    r"""All that a batch holds, by name."""
    return {name: value for name, value in batch.to_dict().items() if isinstance(value, Tensor)}


def same(one: Data, other: Data) -> None:
    a, b = columns(one), columns(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    for name in ("num_sampled_nodes", "num_sampled_edges", "batch_size"):
        assert one.get(name) == other.get(name)


def check_rows(batch: Data, data: Data) -> None:
    r"""Every row in a batch is the one that belongs to its node or edge."""
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
    for name in ("x", "y", "train_mask"):
        assert torch.equal(batch[name], data[name][batch.n_id])
    for name in ("edge_attr", "edge_weight"):
        assert torch.equal(batch[name], data[name][batch.e_id])


def may_have_children() -> None:
    r"""Workers of the gang are daemons, which the standard library lets have no children; users' workers are none."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
