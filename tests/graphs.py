r"""Graphs for tests: a generated one that holds every oddity, and the real ones of the data folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData


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


def typed_graph(seed: int = 0, num_features: int = 8) -> HeteroData:
    r"""A typed graph with 4 node types and 6 relations, of which one is empty and one joins a type with itself.

    Types are ``a`` (40 nodes, labelled in 3 classes, half of them ``train_mask``), ``b`` (30), ``c`` (25) and ``d``
    (7); all are some relation's destination. Edges are in no order, some twice; about a fifth of the nodes have none.

    Returns:
        For each type ``x`` float64 ``[N, num_features]``; for each relation ``t``, float64, from 0 to 1.
    """
    draw = torch.Generator().manual_seed(seed)
    sizes = {"a": 40, "b": 30, "c": 25, "d": 7}
    relations = {
        ("a", "ab", "b"): 110,
        ("b", "ba", "a"): 60,
        ("a", "aa", "a"): 90,
        ("c", "ca", "a"): 70,
        ("d", "dc", "c"): 45,
        ("b", "bd", "d"): 0,
    }
    data = HeteroData()
    for name, size in sizes.items():
        data[name].x = torch.randn(size, num_features, generator=draw, dtype=torch.float64)
    data["a"].y = torch.randint(3, (sizes["a"],), generator=draw)
    data["a"].train_mask = torch.rand(sizes["a"], generator=draw) < 0.5
    for (source, name, destination), count in relations.items():
        ends = [torch.randint(-(-4 * sizes[t] // 5), (count,), generator=draw) for t in (source, destination)]
        edges = torch.stack(ends)
        edges = torch.cat([edges, edges[:, : count // 20]], 1)
        data[source, name, destination].edge_index = edges
        data[source, name, destination].t = torch.rand(edges.size(1), generator=draw, dtype=torch.float64)
    return data
