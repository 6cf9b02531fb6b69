r"""The loader of nodes with the arguments of ``torch_geometric.distributed.DistNeighborLoader``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partpar import sampling
from partpar.distributed.dist_loader import StoreLoader
from partpar.sampling import DistNeighborSampler


class DistNeighborLoader(StoreLoader, sampling.DistNeighborLoader):
    r"""Loads nodes and their neighbourhoods from a pair of stores; see :class:`partpar.sampling.DistNeighborLoader`.

    Args:
        data: A feature store and a graph store.
        num_neighbors: Neighbours of each node to draw in each hop; -1 for all.
        master_addr, master_port: Where processes meet that have no process group; means nothing where they have one.
        current_ctx: Who this process is, likewise.
        input_nodes: See there, and likewise input_time, replace, subgraph_type, disjoint, temporal_strategy, time_attr,
            transform, filter_per_worker and device.
        dist_sampler: Whose options are taken instead.
        concurrency: Batches that are made at a time.
        num_rpc_threads: Questions that are answered at a time.
        async_sampling: Whether batches are made ahead; if not, each is made when it is asked for.
        **kwargs: See :class:`partpar.sampling.DistLoader`; ``rpc_timeout``; and ``rpc_worker_names``, ``collect_features``,
            which mean nothing.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Any,
        master_addr: str | None = None,
        master_port: int | str | None = None,
        current_ctx: Any = None,
        input_nodes: Any = None,
        input_time: Tensor | None = None,
        dist_sampler: DistNeighborSampler | None = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
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
            input_nodes=input_nodes, input_time=input_time, transform=transform, filter_per_worker=filter_per_worker, device=device, **kwargs,
        )  # fmt: skip
