r"""Graphs to train on: generated ones, files of arrays, and those that PyG and OGB download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage

from partpar.errors import GraphError
from partpar.graph.arrays import to_pyg
from partpar.graph.npz import read_npz
from partpar.graph.torch_file import read_saved

GENERATED = ("planted", "karate")
PLANETOID = ("Cora", "CiteSeer", "PubMed")
OGBN = ("ogbn-arxiv", "ogbn-products", "ogbn-papers100M")  # of one type, whose nodes have features and one label


def planted(
    num_nodes: int = 4000,
    num_classes: int = 8,
    num_features: int = 32,
    degree: float = 10.0,
    mixing: float = 0.2,
    noise: float = 3.0,
    tail: float = 2.5,
    num_communities: int | None = None,
    seed: int = 0,
) -> Data:
    r"""Generates an undirected graph with communities, a heavy-tailed degree and noisy features.

    A degree-corrected stochastic block model (Karrer and Newman, "Stochastic blockmodels and community
    structure in networks", Phys. Rev. E 83, 2011): edges join nodes in proportion to their weights, most of
    them within a community. A community has a class; a node's features are the direction of its class and
    Gaussian noise, so that a node alone says little and its neighbourhood much.

    Args:
        num_nodes: Number of nodes.
        num_classes: Number of classes.
        num_features: Columns of ``x``.
        degree: Mean number of neighbours, before loops and duplicates are dropped.
        mixing: Share of edges that ignore the communities.
        noise: Standard deviation of the noise in each column, where the classes' directions have length 1
            each.
        tail: Exponent of the weights' Pareto distribution, above 1; smaller is heavier.
        num_communities: At least :obj:`num_classes`; by default one for each class.
        seed: Of everything random. The same arguments give the same graph.

    Returns:
        ``x`` float32 ``[num_nodes, num_features]``, ``y`` int64 ``[num_nodes]``, ``edge_index`` int64 ``[2,
        E]`` with both directions, sorted by source and target, without loops or duplicates, and
        ``train_mask``, ``val_mask`` and ``test_mask`` (a tenth, two tenths and the rest).

    Raises:
        GraphError: If an argument is out of range.
    """
    num_communities = num_classes if num_communities is None else num_communities
    if not 1 <= num_classes <= num_communities <= num_nodes:
        raise GraphError(
            "expected 1 <= num_classes <= num_communities <= num_nodes, "
            f"found {num_classes}, {num_communities} and {num_nodes}"
        )
    if degree < 0 or not 0 <= mixing <= 1 or noise < 0 or tail <= 1 or num_features < 1:
        raise GraphError(
            "expected degree >= 0, mixing from 0 to 1, noise >= 0, tail > 1 and num_features >= 1, "
            f"found {degree}, {mixing}, {noise}, {tail} and {num_features}"
        )
    draw = np.random.default_rng(seed)
    community = draw.permutation(np.arange(num_nodes) % num_communities)
    y = community % num_classes

    # Nodes stand by community, so that drawing by weight within one is drawing in a range of the running sum.
    by_community = np.argsort(community, kind="stable")
    bounds = np.searchsorted(community[by_community], np.arange(num_communities + 1))
    weight = np.minimum(draw.pareto(tail - 1, num_nodes) + 1, num_nodes**0.5)
    reach = np.concatenate([[0.0], np.cumsum(weight[by_community])])
    src = _draw_by_weight(draw, reach, np.zeros(round(num_nodes * degree / 2)), reach[-1])
    home = community[by_community[src]]
    free = draw.random(len(src)) < mixing
    low = np.where(free, 0.0, reach[bounds[home]])
    dst = _draw_by_weight(draw, reach, low, np.where(free, reach[-1], reach[bounds[home + 1]]))

    pairs = by_community[np.stack([src, dst])]
    pairs = pairs[:, pairs[0] != pairs[1]]
    keys = np.unique(np.concatenate([pairs[0] * num_nodes + pairs[1], pairs[1] * num_nodes + pairs[0]]))
    directions = draw.standard_normal((num_classes, num_features))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    x = directions[y] + noise / num_features**0.5 * draw.standard_normal((num_nodes, num_features))
    role = draw.permutation(num_nodes) / num_nodes
    return Data(
        x=torch.from_numpy(x).float(),
        y=torch.from_numpy(y),
        edge_index=torch.from_numpy(np.stack([keys // num_nodes, keys % num_nodes])),
        train_mask=torch.from_numpy(role < 0.1),
        val_mask=torch.from_numpy((role >= 0.1) & (role < 0.3)),
        test_mask=torch.from_numpy(role >= 0.3),
        num_nodes=num_nodes,
    )


def _draw_by_weight(
    draw: np.random.Generator, reach: np.ndarray, low: np.ndarray | float, high: np.ndarray | float
) -> np.ndarray:
    r"""Draws places whose stretch of the running sum :obj:`reach` holds a point uniform between low and
    high."""
    points = low + draw.random(np.shape(low)) * (np.asarray(high) - low)
    return np.clip(np.searchsorted(reach, points, side="right") - 1, 0, len(reach) - 2)


def karate(seed: int = 0) -> Data:
    r"""Zachary's karate club (J. Anthropol. Res. 33, 1977): 34 nodes, 156 directed edges, the two factions as
    labels.

    Args:
        seed: Of the masks: 8 nodes to train, 8 to validate, 18 to test, both factions among the first.

    Returns:
        ``x`` float32 ``[34, 34]``, the identity; ``y``, ``edge_index`` and the three masks.
    """
    import networkx

    graph = networkx.karate_club_graph()
    pairs = np.array(graph.edges()).T
    pairs = np.concatenate([pairs, pairs[::-1]], axis=1)
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    y = np.array([graph.nodes[node]["club"] != "Mr. Hi" for node in graph], dtype=np.int64)
    draw = np.random.default_rng(seed)
    # The i-th node of either faction comes before the i+1-th of the other, so both are in the training rows.
    order = np.stack([draw.permutation(np.flatnonzero(y == club)) for club in (0, 1)], axis=1).ravel()
    masks = {}
    for name, rows in (("train", order[:8]), ("val", order[8:16]), ("test", order[16:])):
        masks[f"{name}_mask"] = torch.zeros(len(y), dtype=torch.bool)
        masks[f"{name}_mask"][rows] = True
    return Data(
        x=torch.eye(len(y)), y=torch.from_numpy(y), edge_index=torch.from_numpy(pairs.copy()), **masks
    )


def from_npz(path: str | Path, split: int = 0) -> Data | HeteroData:
    r"""Reads a graph from one ``.npz`` file of plain numpy arrays.

    Names are those of :mod:`partpar.graph.arrays`; besides, ``src`` and ``dst`` become ``edge_index`` (so
    that ``t``, ``msg`` and the like are edge attributes), masks ``[num_nodes, num_splits]`` those of one
    split, and arrays of text lists.

    Args:
        path: The file.
        split: Which split's masks, from 0.

    Returns:
        :class:`~torch_geometric.data.Data`, or :class:`~torch_geometric.data.HeteroData` for several types.

    Raises:
        GraphError: If the file is absent or no archive of plain arrays, has no edges or no such split.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path}: expected an .npz file of arrays, found none there")
    arrays = read_npz(path, GraphError)
    if "src" in arrays and "dst" in arrays:
        arrays["edge_index"] = np.stack([arrays.pop("src"), arrays.pop("dst")])
    for name, array in arrays.items():
        if name.split("__")[0].endswith("_mask") and array.ndim == 2:
            if not 0 <= split < array.shape[1]:
                raise GraphError(
                    f"{path}: expected a split from 0 to {array.shape[1] - 1} of {name}, found {split}"
                )
            arrays[name] = array[:, split].copy()
    text = {name: arrays.pop(name) for name in list(arrays) if arrays[name].dtype.kind in "US"}
    data = to_pyg(arrays, str(path))
    for name, array in text.items():
        attribute, *kind = name.split("__")
        store = data if not kind else data[kind[0] if len(kind) == 1 else tuple(kind)]
        store[attribute] = array.tolist()
    return data


def from_pt(path: str | Path) -> Data | HeteroData:
    r"""Reads a graph that :func:`torch.save` wrote, and nothing but a graph: no code of the file's own is
    run.

    Args:
        path: The file of a :class:`~torch_geometric.data.Data` or :class:`~torch_geometric.data.HeteroData`.

    Raises:
        GraphError: If the file is absent, or holds anything else than PyG's data classes, tensors and plain
            values.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path}: expected a file written by torch.save, found none there")
    if path.suffix in (".npz", ".npy"):
        raise GraphError(
            f"{path}: expected a file written by torch.save, found arrays of numpy; read an .npz file by from_npz "
            "(--npz on the command line)"
        )
    allowed = [
        Data,
        HeteroData,
        GlobalStorage,
        BaseStorage,
        NodeStorage,
        EdgeStorage,
        DataEdgeAttr,
        DataTensorAttr,
    ]
    with torch.serialization.safe_globals(allowed):
        data = read_saved(
            path, GraphError, "a PyG graph of tensors and plain values alone, written by torch.save"
        )
    if not isinstance(data, (Data, HeteroData)):
        raise GraphError(f"{path}: expected a PyG Data or HeteroData, found a {type(data).__name__}")
    return data


def _planetoid(name: str, folder: Path) -> Data:
    from torch_geometric.datasets import Planetoid

    data: Data = Planetoid(str(folder), name)[0]
    return data


def _ogb(name: str, folder: Path) -> Data:
    try:
        from ogb.nodeproppred import NodePropPredDataset
    except ImportError:
        raise GraphError(
            f"dataset {name!r} needs the package ogb, which is not installed: pip install ogb"
        ) from None
    dataset = NodePropPredDataset(name, root=str(folder))
    graph, y = dataset[0]
    num_nodes = int(graph["num_nodes"])
    masks: dict[str, Tensor] = {}
    for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        masks[f"{ours}_mask"] = torch.zeros(num_nodes, dtype=torch.bool)
        masks[f"{ours}_mask"][torch.from_numpy(dataset.get_idx_split()[theirs])] = True
    return Data(
        x=torch.from_numpy(graph["node_feat"]),
        y=torch.from_numpy(y).squeeze(1).nan_to_num(-1).long(),
        edge_index=torch.from_numpy(graph["edge_index"]),
        num_nodes=num_nodes,
        **masks,
    )


def load(name: str, folder: str | Path = "data", **options: Any) -> Data | HeteroData:
    r"""Returns a graph by its name.

    Args:
        name: ``"planted"`` or ``"karate"``, made here; ``"Cora"``, ``"CiteSeer"`` or ``"PubMed"``, which PyG
            downloads; ``"ogbn-arxiv"`` and others of :obj:`OGBN`, which the package ``ogb`` downloads; or a path that ends in
            ``.npz`` or ``.pt``.
        folder: Where downloads are kept.
        options: Of :func:`planted`, :func:`karate` or :func:`from_npz`.

    Raises:
        GraphError: If there is no such dataset, or it could not be downloaded.
    """
    if name.endswith(".npz"):
        return from_npz(name, **options)
    if name.endswith(".pt"):
        return from_pt(name)
    made: dict[str, Callable[..., Data]] = {"planted": planted, "karate": karate}
    if name in made:
        return made[name](**options)
    proper = next((known for known in PLANETOID if known.lower() == name.lower()), None)
    if proper is None and name not in OGBN:
        raise GraphError(
            f"expected a dataset among {', '.join([*made, *PLANETOID, *OGBN])}, "
            f"or a path to an .npz or .pt file, found {name!r}"
        )
    try:
        return _ogb(name, Path(folder)) if proper is None else _planetoid(proper, Path(folder))
    except OSError as error:
        # The chain behind it tells of sockets, at length, and no more.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GraphError(
            f"dataset {name!r} is not in {folder} and could not be downloaded ({reason}); "
            "put its files there, or pass a file in the layout of partpar.datasets.from_npz"
        ) from None
