r"""What each layer needs of a sampled batch, and no more.

A batch of :math:`L` hops is sampled for :math:`L` layers, but only the first layer needs all of it: the last one computes
the seeds alone, from their in-neighbours. Nodes of a batch stand by hop, and so do its edges, which are grouped by
destination; so the block of a layer is a prefix of both, and making it copies nothing but 32-bit indices. DGL calls
these message flow graphs (Wang et al., "Deep Graph Library", 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from partpar.errors import SamplingError
from partpar.graph import EdgeType
from partpar.kernels.adjacency import Adjacency

HeteroBlock = dict[EdgeType, Adjacency]


def blocks(batch: Data | HeteroData, num_layers: int | None = None) -> list[Any]:
    r"""The edges that each layer needs, the first layer's first, as the models of :mod:`partpar.models` take them.

    .. code-block:: python

        for batch in loader:
            out = model(batch.x, blocks(batch))          # [batch.batch_size, out_channels]

    Of a heterogeneous batch, each block is a dictionary; a layer of one edge type takes the rows of both its ends:
    ``conv((x[source], x[target][: block[edge_type].num_dst]), block[edge_type])``.

    Args:
        batch: What a loader yields, untransformed as to nodes and edges. Of a ``"directional"`` one, a block holds the
            edges of the hops that its layer needs. Any other has no hops: all its layers get all edges.
        num_layers: Of the model; by default the number of hops.

    Raises:
        SamplingError: There are fewer hops than layers.
    """
    if isinstance(batch, HeteroData):
        return _hetero(batch, num_layers)
    hops = batch.get("num_sampled_edges")
    count = int(batch.num_nodes or 0)
    if hops is None:
        if num_layers is None:
            raise SamplingError(
                "blocks: expected num_layers for a batch that is not sampled hop by hop, found None"
            )
        return [Adjacency.from_edge_index(batch.edge_index, count, count)] * num_layers
    sizes = _prefixes(batch.num_sampled_nodes)
    edges = _prefixes(hops)
    return [
        _prefix(batch.edge_index, edges[hop], sizes[hop + 1], sizes[hop])
        for hop in _order(len(hops), num_layers)
    ]


def _hetero(batch: HeteroData, num_layers: int | None) -> list[HeteroBlock]:
    hops = {t: batch[t].get("num_sampled_edges") for t in batch.edge_types}
    if any(counts is None for counts in hops.values()):
        if num_layers is None:
            raise SamplingError(
                "blocks: expected num_layers for a batch that is not sampled hop by hop, found None"
            )
        whole = {
            t: Adjacency.from_edge_index(
                batch[t].edge_index, int(batch[t[0]].num_nodes or 0), int(batch[t[2]].num_nodes or 0)
            )
            for t in hops
        }
        return [whole] * num_layers
    sizes = {t: _prefixes(batch[t].num_sampled_nodes) for t in batch.node_types}
    edges = {t: _prefixes(counts) for t, counts in hops.items()}
    num_hops = max((len(counts) for counts in hops.values()), default=0)
    return [
        {
            t: _prefix(batch[t].edge_index, edges[t][hop], sizes[t[0]][hop + 1], sizes[t[2]][hop])
            for t in batch.edge_types
        }
        for hop in _order(num_hops, num_layers)
    ]


def _order(num_hops: int, num_layers: int | None) -> range:
    """The last hop that each layer needs, from the first layer to the last."""
    layers = num_hops if num_layers is None else num_layers
    if layers > num_hops:
        raise SamplingError(
            f"blocks: expected as many hops as layers ({layers}), found {num_hops}; lengthen num_neighbors"
        )
    return range(layers - 1, -1, -1)


def _prefixes(counts: Sequence[int]) -> list[int]:
    """How many there are up to and including each hop."""
    return torch.tensor(list(counts), dtype=torch.int64).cumsum(0).tolist()


def _prefix(edge_index: Tensor, num_edges: int, num_src: int, num_dst: int) -> Adjacency:
    src, dst = edge_index[0, :num_edges], edge_index[1, :num_edges]
    if dst.numel() > 1 and bool((dst[1:] < dst[:-1]).any()):  # somebody has put them into another order
        return Adjacency.from_edge_index(edge_index[:, :num_edges], num_src, num_dst)
    indptr = torch._convert_indices_from_coo_to_csr(dst, num_dst)
    return Adjacency(indptr, src.to(torch.int32), num_src, num_dst, check=False)
