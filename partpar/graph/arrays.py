r"""A graph as named numpy arrays: a folder of memory-mapped ``.npy`` files, or any mapping of arrays.

Names are those of PyG's attributes. ``edge_index`` is int64 ``[2, E]``, ``num_nodes`` a scalar. A typed graph adds the
type behind two underscores: ``x__paper``, ``num_nodes__paper``, ``edge_index__author__writes__paper``. Which attributes
belong to nodes and which to edges follows from their rows, as in PyG. A sparse matrix ``x`` may be given by
``x_indptr``, ``x_indices``, ``x_data`` and ``x_shape``; it becomes dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from partpar.errors import GraphError
from partpar.graph.data import GraphData
from partpar.graph.interop import from_pyg_data
from partpar.graph.structure import EDGE, NODE

_CSR = ("_indptr", "_indices", "_data", "_shape")


def open_folder(folder: str | Path) -> GraphData:
    """See :meth:`GraphData.open`."""
    folder = Path(folder)
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise GraphError(f"{folder}: expected a folder of .npy files, one for each attribute; found none")
    arrays = {}
    for file in files:
        try:
            # Copy on write: torch wants writable memory, the file stays as it is.
            arrays[file.stem] = np.load(file, mmap_mode="c", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise GraphError(f"{file}: expected a .npy file of numbers, found {error}") from error
    graph = from_pyg_data(to_pyg(arrays, str(folder)))
    for edge_type in graph.edge_types:
        name = "edge_index" if "edge_index" in arrays else "__".join(("edge_index", *edge_type))
        if name in arrays:
            graph._streams[edge_type] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return graph


def to_pyg(arrays: Mapping[str, np.ndarray], what: str = "arrays") -> Data | HeteroData:
    r"""Makes a PyG graph of named arrays without copying them (sparse matrices apart)."""
    arrays = _densify(arrays, what)
    typed = [name for name in arrays if name.startswith("edge_index__")]
    if not typed:
        if "edge_index" not in arrays:
            raise GraphError(f"{what}: expected an array named edge_index, found {sorted(arrays)}")
        data = Data()
        for name, array in arrays.items():
            data[name] = int(array) if name == "num_nodes" else _tensor(f"{what}: {name}", array)
        return data
    hetero = HeteroData()
    for name, array in arrays.items():
        attribute, *kind = name.split("__")
        if len(kind) not in (1, 3):
            raise GraphError(
                f"{what}: expected names like x__paper or edge_index__author__writes__paper, found {name!r}"
            )
        store = hetero[kind[0]] if len(kind) == 1 else hetero[tuple(kind)]
        store[attribute] = int(array) if attribute == "num_nodes" else _tensor(f"{what}: {name}", array)
    return hetero


def _densify(arrays: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    out = dict(arrays)
    for name in [n for n in arrays if n.endswith("_indptr")]:
        stem = name.removesuffix("_indptr")
        if all(stem + part in out for part in _CSR):
            out[stem] = _dense(f"{what}: {stem}", *(out.pop(stem + part) for part in _CSR))
    return out


def _dense(
    what: str, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: np.ndarray
) -> np.ndarray:
    rows, columns = (int(size) for size in shape)
    fits = len(indptr) == rows + 1 and indptr[0] == 0 and indptr[-1] == len(indices) == len(values)
    if not fits or (np.diff(indptr) < 0).any() or (indices < 0).any() or (indices >= columns).any():
        raise GraphError(
            f"{what}: expected the pieces of a {rows} x {columns} CSR matrix, found ones that do not fit"
        )
    dense = np.zeros((rows, columns), dtype=values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(indptr)), indices] = values
    return dense


def _tensor(what: str, array: np.ndarray) -> Tensor:
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except TypeError as error:
        raise GraphError(
            f"{what}: expected an array of numbers, found dtype {array.dtype}; leave it out or encode it"
        ) from error


def save_folder(graph: GraphData, folder: str | Path) -> None:
    """See :meth:`GraphData.save`."""
    if graph.part is not None:
        raise GraphError("expected a whole graph, found a share; a share is kept by partition_graph")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = graph.node_types == [NODE] and graph.edge_types == [EDGE]

    def write(name: str, kind: tuple[str, ...], value: Tensor | int) -> None:
        np.save(folder / ("__".join([name] if plain else [name, *kind]) + ".npy"), np.asarray(value))

    for node_type in graph.node_types:
        write("num_nodes", (node_type,), graph.num_nodes(node_type))
        for name, value in graph.node(node_type).items():
            write(name, (node_type,), value)
    for edge_type in graph.edge_types:
        write("edge_index", edge_type, graph.edge_index(edge_type))
        for name, value in graph.edge(edge_type).items():
            write(name, edge_type, value)
