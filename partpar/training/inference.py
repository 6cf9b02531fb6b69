r"""Exact inference on the whole graph, layer by layer, in bounded memory.

A network that was trained on sampled neighbourhoods is not evaluated on samples: each layer is computed for all nodes
before the next begins, from the rows that the layer before gave, so nothing is computed twice (the way of the GraphSAGE
paper's own inference, Hamilton et al., NeurIPS 2017). What is held is the rows of one layer and, at a time, what one
chunk of destinations needs.
"""

from __future__ import annotations

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.nn.models.basic_gnn import BasicGNN as PyGBasicGNN

from partpar.errors import GraphError, PartparError
from partpar.graph import GraphData
from partpar.kernels.adjacency import Adjacency
from partpar.models import BasicGNN
from partpar.nn import GCNConv
from partpar.nn.gcn import NormalisedSum
from partpar.nn.neighbourhood import edge_index_of
from partpar.route import Route
from partpar.training.together import all_rows

CHUNK_SIZE = 65536  # destinations; with hidden rows of 128 float32 and 20 in-edges each, some 100 MiB at a time


class InferenceError(PartparError, ValueError):
    r"""A model is none whose layers can be run one after the other, or rows are missing."""


@torch.no_grad()
def full_graph_inference(
    model: torch.nn.Module,
    share: GraphData,
    route: Route | None = None,
    chunk_size: int = CHUNK_SIZE,
    x: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    r"""Runs a model on every node of the graph, in evaluation mode (collective).

    The result is that of one forward pass over the whole graph, whatever the number of workers and :obj:`chunk_size`.

    Args:
        model: Of :mod:`partpar.models`, or one of PyG's own ``GraphSAGE``, ``GIN`` or ``GAT``, however it was trained; in
            :class:`~torch.nn.parallel.DistributedDataParallel` or not. It is left in the mode that it was in.
        share: This worker's share.
        route: Of the share; :obj:`None` when one process owns everything.
        chunk_size: Destinations that are computed at a time.
        x: ``[num_owned, in_channels]``; by default the owned nodes' ``"x"``.
        gather: Whether every rank gets the rows of all nodes, or its own nodes' only.

    Returns:
        ``[num_nodes, out_channels]``: row ``i`` is that of the node with raw id ``i``. With ``gather=False``
        ``[num_owned, out_channels]``, in ascending raw id.

    Raises:
        InferenceError: The model has no layers to run one by one, or one of them cannot be run so; on every rank.
        GraphError: There are no input rows.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    wrong = _why_not(inner)
    if chunk_size < 1:
        wrong = f"expected chunk_size of at least 1, found {chunk_size}"
    if wrong is not None:
        raise InferenceError(f"full_graph_inference: {wrong}")
    assert isinstance(inner, PyGBasicGNN)
    owned = share.node("dst")
    if x is None and "x" not in owned:
        raise GraphError(f"full_graph_inference: expected node attribute 'x', found {sorted(owned)}; pass x")
    was_training = inner.training
    inner.eval()
    try:
        out = _run(inner, owned["x"] if x is None else x, share, route, chunk_size)
    finally:
        inner.train(was_training)
    raw_ids = owned["raw_ids"] if "raw_ids" in owned else torch.arange(owned.num_rows)
    if gather and route is not None and route.group is not None:
        out, raw_ids = all_rows(out, route.group), all_rows(raw_ids, route.group)
    return out[raw_ids.argsort()]


def _why_not(model: torch.nn.Module) -> str | None:
    if not isinstance(model, PyGBasicGNN):
        return (
            f"expected a model of partpar.models, or PyG's GraphSAGE, GIN or GAT, found {type(model).__name__}, whose layers "
            f"are not known; run it on the full graph, as model(x, share.edge_index(), route)"
        )
    if not isinstance(model, BasicGNN) and isinstance(model.convs[0], pyg_nn.GCNConv):
        return (
            f"expected layers that take (sources, destinations), found PyG's {type(model.convs[0]).__name__}; load its "
            f"state_dict into partpar.models.{type(model).__name__}"
        )
    over_all = (pyg_nn.GraphNorm, pyg_nn.PairNorm, pyg_nn.InstanceNorm, pyg_nn.MeanSubtractionNorm, pyg_nn.DiffGroupNorm)
    for norm in model.norms or ():
        if isinstance(norm, over_all) or (isinstance(norm, pyg_nn.LayerNorm) and norm.mode == "graph"):
            return f"expected norms that work row by row in evaluation, found {type(norm).__name__}"
    return None


def _run(model: PyGBasicGNN, x: Tensor, share: GraphData, route: Route | None, chunk_size: int) -> Tensor:
    adj, hidden = share.adj(), []
    for i in range(model.num_layers):
        x = _layer(model, i, x, adj, route, chunk_size)
        if model.jk_mode is not None:
            hidden.append(x)
    out: Tensor = model.jk(hidden) if hasattr(model, "jk") else x
    return model.lin(out) if hasattr(model, "lin") else out


def _layer(
    model: PyGBasicGNN, i: int, x: Tensor, adj: Adjacency, route: Route | None, chunk_size: int
) -> Tensor:
    """One layer for all owned nodes. Every rank exchanges rows once, however many chunks it has."""
    conv = model.convs[i]
    norm = None
    if isinstance(conv, GCNConv):  # its linear map comes first, which leaves a sum with weights known beforehand
        norm = conv._norm(adj, route, None, x.dtype)
        x = torch.cat([conv.lin(rows) for rows in x.split(chunk_size)] or [conv.lin(x)])
    sources = x if route is None else route.apply(x)  # no policy rounds rows where there are no gradients
    pieces = []
    for first in range(0, adj.num_dst, chunk_size) or (0,):
        last = min(first + chunk_size, adj.num_dst)
        if norm is not None:
            rows = _normalised(norm, sources, first, last)
            rows = rows if conv.bias is None else rows + conv.bias
        else:
            block, needed = _chunk(adj, first, last)
            inputs = sources[needed]
            edges = block if isinstance(model, BasicGNN) else edge_index_of(block)
            rows = conv((inputs, inputs[: block.num_dst]), edges)
        pieces.append(_after(model, i, rows))
    return torch.cat(pieces)


def _after(model: PyGBasicGNN, i: int, rows: Tensor) -> Tensor:
    """What follows a convolution within a layer: activation and norm."""
    if i == model.num_layers - 1 and model.jk_mode is None:
        return rows
    if model.act is not None and model.act_first:
        rows = model.act(rows)
    norm = model.norms[i] if model.norms is not None else None
    if norm is not None and not isinstance(norm, torch.nn.Identity):
        rows = norm(rows)
    if model.act is not None and not model.act_first:
        rows = model.act(rows)
    return rows


def _chunk(adj: Adjacency, first: int, last: int) -> tuple[Adjacency, Tensor]:
    """The edges into some destinations, as a block, and the sources it needs: those destinations first."""
    low, high = int(adj.indptr[first]), int(adj.indptr[last])
    indices = adj.indices[low:high].to(torch.int64)
    destinations = torch.arange(first, last)
    row = torch.full((adj.num_src,), -1, dtype=torch.int32)
    row[destinations] = torch.arange(last - first, dtype=torch.int32)
    others = indices[row[indices] < 0].unique()
    row[others] = torch.arange(last - first, last - first + others.numel(), dtype=torch.int32)
    needed = torch.cat([destinations, others])
    indptr = adj.indptr[first : last + 1] - low
    return Adjacency(indptr, row[indices], needed.numel(), last - first, check=False), needed


def _normalised(norm: NormalisedSum, sources: Tensor, first: int, last: int) -> Tensor:
    """The rows of some destinations of a normalised sum."""
    block, needed = _chunk(norm.adj, first, last)
    low, high = int(norm.adj.indptr[first]), int(norm.adj.indptr[last])
    weight = None if norm.weight is None else norm.weight[low:high]
    scale = None if norm.scale is None else norm.scale[needed]
    return NormalisedSum(block, weight, scale).of_sources(sources[needed])
