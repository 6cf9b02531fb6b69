r"""To and from PyG and networkx."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import networkx
import numpy as np
import torch
import torch_geometric.utils
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.storage import BaseStorage

from partpar.errors import GraphError
from partpar.graph.data import GraphData
from partpar.graph.frame import Frame
from partpar.graph.structure import EDGE, NODE

_PLAIN = (str, int, float, bool, type(None))


def from_pyg_data(data: Data | HeteroData) -> GraphData:
    """See :meth:`GraphData.from_pyg_data`."""
    if isinstance(data, HeteroData):
        odd: list[str] = []
        graph = _from_hetero(data, odd)
        _warn(odd)
        return graph
    if not isinstance(data, Data):
        raise GraphError(f"expected a torch_geometric Data or HeteroData, found {type(data).__name__}")
    if data.num_nodes is None:
        raise GraphError(
            "expected a graph with nodes, found no attribute that tells how many; set data.num_nodes"
        )
    edge_index = _edge_index("data", data.get("edge_index"))
    nodes = Frame(int(data.num_nodes), what="nodes")
    edges = Frame(edge_index.size(1), what="edges")
    meta: dict[str, Any] = {}
    for name, value in data.to_dict().items():
        if name in ("edge_index", "num_nodes"):
            continue
        if data.is_node_attr(name) and _has_rows(data, name, value):
            nodes[name] = _tensor(f"node attribute {name!r}", value)
        elif data.is_edge_attr(name) and _has_rows(data, name, value):
            edges[name] = _tensor(f"edge attribute {name!r}", value)
        else:
            meta[name] = _plain(name, value)
    _warn(
        f"{name}: {value.size(0)} rows, neither {nodes.num_rows} nodes nor {edges.num_rows} edges"
        for name, value in meta.items()
        if _looks_like_rows(data, name, value)
    )
    return GraphData({NODE: nodes}, {EDGE: edges}, {EDGE: edge_index}, meta)


def _from_hetero(data: HeteroData, odd: list[str]) -> GraphData:
    """Tells in ``odd`` what looks like rows and does not fit its type."""
    nodes, edges, structure = {}, {}, {}
    meta = {name: _plain(name, value) for name, value in data._global_store.items()}
    for store in data.node_stores:
        if store.num_nodes is None:
            raise GraphError(
                f"node type {store._key!r}: found no attribute that tells how many nodes; set num_nodes"
            )
        nodes[store._key] = _frame(
            store, int(store.num_nodes), ("num_nodes",), f"nodes of type {store._key!r}", meta, odd
        )
    for store in data.edge_stores:
        key = store._key
        structure[key] = _edge_index(str(key), store.get("edge_index"))
        edges[key] = _frame(store, structure[key].size(1), ("edge_index",), f"edges of type {key}", meta, odd)
    return GraphData(nodes, edges, structure, meta)


def _frame(
    store: BaseStorage, num_rows: int, structural: tuple[str, ...], what: str, meta: dict[str, Any], odd: list[str]
) -> Frame:
    """The attributes of one type; what does not have its rows goes to ``meta`` under the type's name, and is told
    in ``odd`` where it looks like rows."""
    frame = Frame(num_rows, what=what)
    for name, value in store.items():
        if name in structural:
            continue
        if (store.is_node_attr(name) or store.is_edge_attr(name)) and _has_rows(
            store._parent(), name, value, store
        ):
            frame[name] = _tensor(f"attribute {name!r} of {what}", value)
        else:
            key = store._key if isinstance(store._key, str) else "__".join(store._key)
            kept = meta[f"{name}__{key}"] = _plain(name, value)
            if _looks_like_rows(store._parent(), name, kept, store):
                odd.append(f"{name}: {kept.size(0)} rows, not the {num_rows} {what}")
    return frame


def from_networkx(graph: networkx.Graph) -> GraphData:
    """See :meth:`GraphData.from_networkx`."""
    data = torch_geometric.utils.from_networkx(graph)
    data.num_nodes = graph.number_of_nodes()
    return from_pyg_data(data)


def to_pyg_data(graph: GraphData) -> Data | HeteroData:
    """See :meth:`GraphData.to_pyg_data`."""
    if graph.node_types == [NODE] and graph.edge_types == [EDGE]:
        data = Data(edge_index=graph.edge_index(), num_nodes=graph.num_nodes())
        for attributes in (graph.node(), graph.edge(), graph.meta()):
            for name, value in attributes.items():
                data[_free(name, data)] = value
        return data
    hetero = HeteroData(**graph.meta())
    for node_type in graph.node_types:
        hetero[node_type].num_nodes = graph.num_nodes(node_type)
        for name, value in graph.node(node_type).items():
            hetero[node_type][name] = value
    for edge_type in graph.edge_types:
        hetero[edge_type].edge_index = graph.edge_index(edge_type)
        for name, value in graph.edge(edge_type).items():
            hetero[edge_type][name] = value
    return hetero


def _free(name: str, data: Data) -> str:
    """Nodes and edges of a share both have ``raw_ids``; the second to come is named for the edges."""
    return f"edge_{name}" if name in data else name


def _edge_index(what: str, edge_index: Any) -> Tensor:
    if edge_index is None:
        raise GraphError(
            f"{what}: expected edge_index, found none; set it, or where there is an adj_t: from torch_geometric.utils "
            "import to_edge_index; data.edge_index = to_edge_index(data.adj_t)[0].flip(0); del data.adj_t"
        )
    if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or edge_index.size(0) != 2:
        found = tuple(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise GraphError(f"{what}: expected edge_index to be a tensor of shape [2, E], found {found}")
    if edge_index.dtype != torch.int64:
        raise GraphError(
            f"{what}: expected edge_index of dtype torch.int64, found {edge_index.dtype}; use edge_index.long()"
        )
    return edge_index.as_subclass(Tensor)


def _has_rows(data: Data | HeteroData, name: str, value: Any, *args: Any) -> bool:
    """Neither attributes that PyG concatenates along another dimension, as it does ``*_index``, nor strings do."""
    if isinstance(value, Tensor):
        return data.__cat_dim__(name, value, *args) == 0
    return not (isinstance(value, (list, tuple)) and any(isinstance(item, str) for item in value))


def _looks_like_rows(data: Data | HeteroData, name: str, value: Any, *args: Any) -> bool:
    """Whether a tensor that is neither node- nor edge-shaped was perhaps meant to be."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) > 1 and _has_rows(data, name, value, *args)


def _warn(odd: Iterable[str]) -> None:
    """Tells the user's line, once, what did not become an attribute."""
    if told := "; ".join(odd):
        warnings.warn(f"{told}; kept in meta()", stacklevel=4)


def _tensor(what: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return _dense(what, value)
    try:
        return torch.from_numpy(np.asarray(value).copy())
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"{what}: expected a tensor or numbers, found {type(value).__name__}; encode it as a tensor"
        ) from error


def _dense(what: str, value: Tensor) -> Tensor:
    if value.layout != torch.strided:
        raise GraphError(f"{what}: expected a dense tensor, found layout {value.layout}; use to_dense()")
    return value


def _plain(name: str, value: Any) -> Any:
    """Checks that a graph-level attribute can be kept and written."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in inner:
        if isinstance(item, Tensor):
            raise GraphError(
                f"attribute {name!r}: expected a tensor or plain values, found tensors inside a {type(value).__name__}"
            )
        _plain(name, item)
    if isinstance(value, Tensor):
        return _dense(f"attribute {name!r}", value)
    if not isinstance(value, (*_PLAIN, list, tuple, dict)):
        raise GraphError(
            f"attribute {name!r}: expected a node or edge attribute, a dense tensor, a number, a string or lists of them; "
            f"found {type(value).__name__}; remove or convert it"
        )
    return value
