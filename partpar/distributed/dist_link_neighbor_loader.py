r"""The loader of links with the arguments of ``torch_geometric.distributed.DistLinkNeighborLoader``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partpar import sampling
from partpar.distributed.dist_loader import StoreLoader
from partpar.sampling import DistNeighborSampler


class DistLinkNeighborLoader(StoreLoader, sampling.DistLinkNeighborLoader):
    r"""Loads links and the neighbourhoods of their ends from a pair of stores; see
    :class:`partpar.sampling.DistLinkNeighborLoader`, and :class:`~partpar.distributed.DistNeighborLoader` for what both
    have in common.

    Args:
        data: A feature store and a graph store.
        num_neighbors: Neighbours of each node to draw in each hop; -1 for all.
        master_addr, master_port, current_ctx: As there.
        edge_label_index, edge_label, edge_label_time, neg_sampling, neg_sampling_ratio: See
            :class:`partpar.sampling.DistLinkNeighborLoader`.
        dist_sampler: As there, and likewise replace, subgraph_type, disjoint, temporal_strategy, time_attr, transform,
            concurrency, num_rpc_threads, filter_per_worker, async_sampling and device.
        **kwargs: As there.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Any,
        master_addr: str | None = None,
        master_port: int | str | None = None,
        current_ctx: Any = None,
        edge_label_index: Any = None,
        edge_label: Tensor | None = None,
        edge_label_time: Tensor | None = None,
        dist_sampler: DistNeighborSampler | None = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        neg_sampling: Any = None,
        neg_sampling_ratio: float | None = None,
        time_attr: str | None = None,
        transform: Any = None,
        concurrency: int = 1,
        num_rpc_threads: int = 16,
        filter_per_worker: bool | None = False,
        async_sampling: bool = True,
        device: Any = None,
        weight_attr: str | None = None,
        rpc_timeout: float = 180,
        **kwargs: Any,
    ) -> None:
        draws = {
            "num_neighbors": num_neighbors, "replace": replace, "subgraph_type": subgraph_type, "disjoint": disjoint,
            "temporal_strategy": temporal_strategy, "time_attr": time_attr, "weight_attr": weight_attr,
        }  # fmt: skip
        meeting = (master_addr, master_port, num_rpc_threads, rpc_timeout)
        self._set_up(
            dist_sampler, current_ctx, data, meeting, concurrency, async_sampling, draws,
            edge_label_index=edge_label_index, edge_label=edge_label, edge_label_time=edge_label_time,
            neg_sampling=neg_sampling, neg_sampling_ratio=neg_sampling_ratio, transform=transform,
            filter_per_worker=filter_per_worker, device=device, **kwargs,
        )  # fmt: skip
