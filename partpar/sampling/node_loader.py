r"""Mini-batches of nodes and their sampled neighbourhoods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partpar import exchange
from partpar.errors import SamplingError
from partpar.sampling.batches import Recipe
from partpar.sampling.inputs import NodeInputs, node_inputs, share_out
from partpar.sampling.loader import TIMEOUT, DistLoader, together
from partpar.sampling.neighbor_sampler import NumNeighborsType, sampling_options
from partpar.sampling.source import attributes, opened
from partpar.serving.partition import is_typed
from partpar.serving.service import Service


class DistNeighborLoader(DistLoader):
    r"""Loads seeds and their sampled in-neighbourhoods from a partitioned graph, as
    :class:`torch_geometric.loader.NeighborLoader` does from a whole one (collective: all ranks make it, iterate and close
    it alike).

    .. code-block:: python

        share = GraphData.load_partition("partitions", worker.rank, worker.world_size)
        loader = DistNeighborLoader(share, num_neighbors=[10, 5], input_nodes=share.node()["train_mask"],
                                    batch_size=1024, shuffle=True)
        for batch in loader:
            out = model(batch.x, blocks(batch))            # [batch.batch_size, num_classes]
            loss = F.cross_entropy(out, batch.y[: batch.batch_size])

    A batch is a :class:`~torch_geometric.data.Data`, or ``HeteroData`` of a graph with types, with every attribute of its
    nodes and edges, and ``n_id``, ``e_id``, ``input_id``, ``batch_size``, ``num_sampled_nodes``, ``num_sampled_edges``,
    ``batch`` and ``seed_time`` as PyG sets them. All ids are raw ids.

    Alone, in one process, it takes any graph, and needs no process group.

    Args:
        data: This rank's share (:class:`~partpar.GraphData`), a whole graph (ours, :class:`~torch_geometric.data.Data` or
            :class:`~torch_geometric.data.HeteroData`), a :class:`~partpar.serving.Service`, or a pair of a
            :class:`~partpar.serving.LocalFeatureStore` and a :class:`~partpar.serving.LocalGraphStore`.
        num_neighbors (List[int] or Dict[EdgeType, List[int]]): Neighbours of each node to draw in each hop; -1 for all.
        input_nodes (optional): The seeds: raw ids, a mask, a node type, or a pair of a node type and one of these;
            :obj:`None` for all nodes. Ids are this rank's own seeds. A mask may have a row for each owned node, or for each
            node of the graph: then it is common to all ranks.
        input_time (torch.Tensor, optional): A time for each seed, instead of its own :obj:`time_attr`.
        seeds (str): With ``"shared"``, ids are given alike to all ranks, too. What is common is shared out: each rank takes
            its own nodes first, and ranks are levelled. (default: ``"own"``)
        replace (bool): Draw with replacement. (default: :obj:`False`)
        subgraph_type (str): ``"directional"``, ``"bidirectional"`` or ``"induced"``. (default: ``"directional"``)
        disjoint (bool): A tree of its own for each seed; always so with times. (default: :obj:`False`)
        temporal_strategy (str): ``"uniform"`` or ``"last"``. (default: ``"uniform"``)
        time_attr (str, optional): Node or edge attribute; nothing later than its seed is drawn.
        weight_attr (str, optional): Edge attribute that chances are proportional to.
        attributes (List[str], optional): Bring only these attributes of nodes and edges.
        seed (int): Of everything random, the same on every rank. (default: :obj:`0`)
        **kwargs: See :class:`~partpar.sampling.DistLoader`.

    Raises:
        SamplingError, IdError: Arguments do not fit each other or the graph. What is wrong with one rank's seeds raises
            on every rank.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: NumNeighborsType,
        input_nodes: Any = None,
        input_time: Tensor | None = None,
        seeds: str = "own",
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        time_attr: str | None = None,
        weight_attr: str | None = None,
        attributes: Sequence[str] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if input_time is not None and time_attr is None:
            raise SamplingError("input_time: expected time_attr as well, found none; name the attribute that it is compared with")
        self.data = data
        with opened(data, kwargs.get("timeout") or TIMEOUT) as source:
            options = sampling_options(
                num_neighbors, replace, subgraph_type, disjoint, temporal_strategy, time_attr, weight_attr
            )
            service = source.service
            with together(type(self).__name__):
                inputs = _seeds(service, input_nodes, seeds)
                columns = _columns(service, inputs, input_time, time_attr)
            recipe = Recipe(
                not is_typed(service.share), seed, options, names_of(service, attributes), inputs.node_type, columns
            )
            super().__init__(service, recipe, **kwargs)
        self._closers.append(source.close)


def names_of(service: Service, names: Sequence[str] | None) -> dict[Any, list[str]]:
    r"""The attributes that batches bring."""
    return attributes(service.share, names)


def place_of(service: Service) -> tuple[int, int]:
    r"""``(ranks of each part, which of them this one is)``."""
    rank, world_size = exchange.rank_and_size(exchange.own_group())
    each = max(world_size // service.num_parts, 1)
    return each, rank % each


def _seeds(service: Service, input_nodes: Any, seeds: str) -> NodeInputs:
    """This rank's seeds."""
    each, number = place_of(service)
    inputs = node_inputs(service.share, input_nodes, seeds, each, number)
    rank, world_size = exchange.rank_and_size(exchange.own_group())
    if not inputs.common or world_size == 1:
        return inputs
    if world_size % service.num_parts:
        parts, num_parts = torch.zeros_like(inputs.raw_ids), 1  # every rank holds the whole graph
    else:
        ids = service.ids_of(inputs.node_type, inputs.raw_ids)
        parts = torch.searchsorted(service.offsets(inputs.node_type), ids, right=True) - 1
        num_parts = service.num_parts
    mine = (share_out(parts, num_parts, world_size) == rank).nonzero().flatten()
    return NodeInputs(inputs.node_type, inputs.raw_ids[mine], inputs.input_id[mine])


def _columns(
    service: Service, inputs: NodeInputs, input_time: Tensor | None, time_attr: str | None
) -> dict[str, Tensor]:
    ids = service.ids_of(inputs.node_type, inputs.raw_ids)
    columns = {"input_id": inputs.input_id, "ids": ids, "raw_ids": inputs.raw_ids}
    if time_attr is None:
        return columns
    if input_time is not None:
        times = torch.as_tensor(input_time).to(torch.int64)
        if times.dim() != 1 or (inputs.input_id.numel() and times.numel() <= int(inputs.input_id.max())):
            raise SamplingError(
                f"input_time: expected a time for each of the {inputs.raw_ids.numel()} seeds, found shape {tuple(times.shape)}"
            )
        return {**columns, "times": times[inputs.input_id]}
    if not service.has_node_attr(inputs.node_type, time_attr):
        raise SamplingError(
            f"expected a time for each seed, since nodes of type {inputs.node_type!r} have no attribute {time_attr!r}; "
            f"give input_time"
        )
    return {**columns, "times": service.node_rows(inputs.node_type, time_attr, ids).to(torch.int64)}
