r"""Graphs for tests: a generated one that holds every oddity, and the real ones of the data folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data


def directed_graph(
    seed: int = 0, num_nodes: int = 60, num_edges: int = 260, num_features: int = 8, num_classes: int = 4
) -> Data:
    r"""A directed graph with sources and sinks, isolated nodes, self-loops and duplicate edges.

    Edges are in no order. The last three nodes have no edge at all, the three before only out-edges, the
    three before those only in-edges; five self-loops and ten copies of other edges are added.

    Returns:
        ``x`` float64 [num_nodes, num_features], ``y`` int64 [num_nodes], ``edge_index`` int64 [2, num_edges +
        15], ``edge_attr`` float64 [num_edges + 15, 3], ``edge_weight`` float64 [num_edges + 15], positive,
        and the masks ``train_mask``, ``val_mask`` and ``test_mask`` (half, a quarter, a quarter).
    """
    draw = torch.Generator().manual_seed(seed)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=draw)

    inner = num_nodes - 9  # then 3 only with in-edges, 3 only with out-edges, 3 isolated
    src, dst = integers(inner + 3, num_edges), integers(inner + 3, num_edges)
    src = torch.where(src >= inner, src + 3, src)
    loops = integers(inner, 5)
    copies = integers(num_edges, 10)
    edge_index = torch.stack([torch.cat([src, loops, src[copies]]), torch.cat([dst, loops, dst[copies]])])
    edge_index = edge_index[:, torch.randperm(num_edges + 15, generator=draw)]
    role = torch.randperm(num_nodes, generator=draw) % 4
    return Data(
        x=torch.randn(num_nodes, num_features, generator=draw, dtype=torch.float64),
        y=integers(num_classes, num_nodes),
        edge_index=edge_index,
        edge_attr=torch.randn(num_edges + 15, 3, generator=draw, dtype=torch.float64),
        edge_weight=torch.rand(num_edges + 15, generator=draw, dtype=torch.float64) + 0.1,
        train_mask=role < 2,
        val_mask=role == 2,
        test_mask=role == 3,
        num_nodes=num_nodes,
    )


def data_folder() -> Path:
    r"""The folder of real graphs: ``PARTPAR_DATA``, or ``shared/data`` beside the clone."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("PARTPAR_DATA", beside))


def npz_path(name: str) -> Path:
    r"""The file of a real graph; skips the test where there is none."""
    path = data_folder() / f"{name}.npz"
    if not path.exists():
        pytest.skip(
            f"no {name}.npz in {data_folder()}: set PARTPAR_DATA to the folder of graph files to run this"
        )
    return path


def load_npz_graph(name: str) -> Data:
    r"""A real one-type graph by its file's name, such as ``"cora"``; skips the test where there is none.

    Every array of the file becomes an attribute; ``x`` is made dense where it is stored as the pieces of a
    CSR matrix (``x_indptr``, ``x_indices``, ``x_data``, ``x_shape``).
    """
    with np.load(npz_path(name), allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if "x_indptr" in arrays:
        arrays["x"] = _dense(*(arrays.pop(f"x_{piece}") for piece in ("indptr", "indices", "data", "shape")))
    num_nodes = int(arrays.pop("num_nodes"))
    return Data(num_nodes=num_nodes, **{key: torch.from_numpy(array) for key, array in arrays.items()})


def _dense(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, shape: np.ndarray) -> np.ndarray:
    dense = np.zeros(shape, dtype=data.dtype)
    dense[np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), indices] = data
    return dense
