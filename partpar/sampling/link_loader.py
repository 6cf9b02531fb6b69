r"""Mini-batches of links and the sampled neighbourhoods of their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.sampler import NegativeSampling

from partpar.errors import SamplingError
from partpar.graph import EdgeType
from partpar.sampling.batches import Recipe
from partpar.sampling.inputs import link_type
from partpar.sampling.loader import TIMEOUT, DistLoader, together
from partpar.sampling.neighbor_sampler import NumNeighborsType, sampling_options
from partpar.sampling.node_loader import names_of, place_of
from partpar.sampling.source import opened
from partpar.serving.partition import is_typed
from partpar.serving.service import Service


class DistLinkNeighborLoader(DistLoader):
    r"""Loads links, and the sampled in-neighbourhoods of their ends, from a partitioned graph, as
    :class:`torch_geometric.loader.LinkNeighborLoader` does from a whole one (collective).

    A batch has ``edge_label_index``, ``edge_label`` and ``edge_label_time``, or for triplets ``src_index``,
    ``dst_pos_index`` and ``dst_neg_index``, as PyG sets them, and besides what
    :class:`~partpar.sampling.DistNeighborLoader` gives.

    Args:
        data: As for :class:`~partpar.sampling.DistNeighborLoader`.
        num_neighbors: Likewise.
        edge_label_index (optional): This rank's links: raw ids ``[2, n]``, an edge type, or a pair of an edge type and ids
            or :obj:`None`; :obj:`None` for the edges of this rank's share.
        edge_label (torch.Tensor, optional): ``[n, *]``. With binary negatives and a label 0, labels are raised by one, as
            in PyG: 0 then says "negative".
        edge_label_time (torch.Tensor, optional): ``[n]``, goes with :obj:`time_attr`: nothing later is drawn for a link.
        neg_sampling (NegativeSampling or str or dict, optional): ``"binary"`` or ``"triplet"``, and how many.
        neg_sampling_ratio (float, optional): Binary negatives for each positive link.
        strict_negatives (bool): Draw no negative link that is a link of the batch or an edge of the graph. (default:
            :obj:`False`)
        replace, subgraph_type, disjoint, temporal_strategy, time_attr, weight_attr, attributes, seed: As for
            :class:`~partpar.sampling.DistNeighborLoader`.
        **kwargs: See :class:`~partpar.sampling.DistLoader`.

    Raises:
        SamplingError, IdError: Arguments do not fit each other or the graph. What is wrong with one rank's links raises
            on every rank.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: NumNeighborsType,
        edge_label_index: Any = None,
        edge_label: Tensor | None = None,
        edge_label_time: Tensor | None = None,
        neg_sampling: Any = None,
        neg_sampling_ratio: float | None = None,
        strict_negatives: bool = False,
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
        if (edge_label_time is None) != (time_attr is None):
            given, missing = ("edge_label_time", "time_attr") if time_attr is None else ("time_attr", "edge_label_time")
            raise SamplingError(f"{given}: expected {missing} as well, found none; times are compared with an attribute")
        if neg_sampling_ratio:
            neg_sampling = NegativeSampling("binary", neg_sampling_ratio)
        self.neg_sampling = NegativeSampling.cast(neg_sampling)
        if self.neg_sampling is not None and edge_label is not None:
            if self.neg_sampling.is_triplet():
                raise SamplingError("edge_label: expected none with triplets, which say themselves what is negative, found some")
            if edge_label.numel() and int(edge_label.min()) == 0:
                edge_label = edge_label + 1
        self.data = data
        with opened(data, kwargs.get("timeout") or TIMEOUT) as source:
            options = sampling_options(
                num_neighbors, replace, subgraph_type, disjoint, temporal_strategy, time_attr, weight_attr
            )
            service = source.service
            with together(type(self).__name__):
                edge_type, columns = _columns(service, edge_label_index, edge_label, edge_label_time)
            recipe = Recipe(
                not is_typed(service.share), seed, options, names_of(service, attributes), edge_type, columns,
                self.neg_sampling, strict_negatives,
            )  # fmt: skip
            super().__init__(service, recipe, **kwargs)
        self._closers.append(source.close)


def _columns(
    service: Service, given: Any, label: Tensor | None, times: Tensor | None
) -> tuple[EdgeType, dict[str, Tensor]]:
    edge_type, index = link_type(service.share, given)
    columns: dict[str, Tensor] = {}
    if index is None:
        each, number = place_of(service)
        share = service.share
        row, col = share.edge_index(edge_type)
        for end, side, rows in (("src", "src", row), ("dst", "dst", col)):
            rows = rows.tensor_split(each)[number]
            frame = share.node(edge_type[0 if end == "src" else 2], side)
            for name in ("ids", "raw_ids"):
                columns[f"{end}_{name}"] = frame[name][rows] if name in frame else rows
        frame = share.edge(edge_type)
        ids = frame["raw_ids"] if "raw_ids" in frame else torch.arange(frame.num_rows)
        columns["input_id"] = ids.tensor_split(each)[number]
        chosen: Any = torch.arange(frame.num_rows).tensor_split(each)[number]
    else:
        for end, node_type, raw_ids in (("src", edge_type[0], index[0]), ("dst", edge_type[2], index[1])):
            columns[f"{end}_ids"] = service.ids_of(node_type, raw_ids.contiguous())
            columns[f"{end}_raw_ids"] = raw_ids.contiguous()
        columns["input_id"] = torch.arange(index.size(1))
        chosen = slice(None)
    count = columns["input_id"].numel()
    for name, column in (("edge_label", label), ("edge_label_time", times)):
        if column is None:
            continue
        rows = torch.as_tensor(column)[chosen] if index is not None or column.size(0) != count else torch.as_tensor(column)
        if rows.size(0) != count:
            raise SamplingError(f"{name}: expected a row for each of the {count} links, found {rows.size(0)}")
        columns["labels" if name == "edge_label" else "times"] = rows if name == "edge_label" else rows.to(torch.int64)
    return edge_type, columns
