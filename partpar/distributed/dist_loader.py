r"""What loaders by the names of ``torch_geometric.distributed`` have beside partpar's own."""

from __future__ import annotations

import atexit
import os
import queue
from typing import Any

import torch.distributed as dist

from partpar.distributed.rpc import init_rpc, shutdown_rpc
from partpar.sampling import DistLoader, DistNeighborSampler
from partpar.serving import agent

__all__ = ["DistLoader", "StoreLoader"]

_THREADS = 2  # that make batches, whatever `concurrency` is; more would only wait for each other


def connected(
    dist_sampler: DistNeighborSampler | None,
    current_ctx: Any,
    data: Any,
    master_addr: str | None,
    master_port: int | str | None,
    num_rpc_threads: int,
    rpc_timeout: float,
    **options: Any,
) -> DistNeighborSampler:
    r"""A sampler whose processes answer each other (collective): over the process group, if there is one, else over the
    address given.

    Args:
        dist_sampler: The sampler, if it is made already.
        current_ctx, data: As for :class:`DistNeighborSampler`.
        master_addr, master_port, num_rpc_threads, rpc_timeout: As for a loader.
        **options: Further arguments of the sampler.
    """
    sampler = dist_sampler
    if sampler is None:
        sampler = DistNeighborSampler(current_ctx, data, timeout=rpc_timeout, **options)
    sampler.init_sampler_instance()
    assert sampler._share is not None
    if sampler._share.num_parts > 1 and not agent.is_running():
        if dist.is_initialized() and dist.get_world_size() > 1:
            agent.start_in_default_group(rpc_timeout, num_rpc_threads)
        else:
            address = master_addr or os.environ.get("MASTER_ADDR")
            port = master_port or int(os.environ.get("MASTER_PORT", "-1")) + 1
            if address is None or not port or current_ctx is None:
                raise ValueError(
                    "expected current_ctx, master_addr and master_port, or a process group, to reach the other parts by; found "
                    f"{current_ctx}, {address} and {port}"
                )
            init_rpc(current_ctx, address, port, num_rpc_threads, rpc_timeout)
        atexit.register(shutdown_rpc)
    sampler.register_sampler_rpc()
    return sampler


class StoreLoader(DistLoader):
    r"""A loader of a pair of stores. As a context manager it begins an epoch, and stays usable after it."""

    data: Any

    def _set_up(
        self,
        dist_sampler: DistNeighborSampler | None,
        current_ctx: Any,
        data: Any,
        meeting: tuple[str | None, int | str | None, int, float],
        concurrency: int,
        async_sampling: bool,
        draws: dict[str, Any],
        **options: Any,
    ) -> None:
        """
        Args:
            meeting: ``master_addr``, ``master_port``, ``num_rpc_threads`` and ``rpc_timeout``.
            draws: Arguments of the sampler.
            **options: Of the loader, and those that mean nothing.
        """
        options, channel = rename(options, concurrency, async_sampling)
        seed = options.get("seed", 0)
        sampler = connected(dist_sampler, current_ctx, data, *meeting, concurrency=concurrency, seed=seed, **draws)
        assert sampler.service is not None
        super().__init__(sampler.service, **sampler.options, **options)  # of partpar's own loader of nodes or links
        self.data, self.dist_sampler, self.current_ctx, self.channel = data, sampler, current_ctx, channel
        self.neighbor_sampler = self.node_sampler = self.link_sampler = sampler

    def __enter__(self) -> Any:
        return iter(self)

    def __exit__(self, *_: object) -> None:
        self._stop()


def rename(kwargs: dict[str, Any], concurrency: int, async_sampling: bool) -> tuple[dict[str, Any], Any]:
    r"""Arguments of the original as ours, and a channel that is always empty: batches do not pass through one."""
    for name in ("rpc_worker_names", "collect_features", "master_addr", "master_port"):
        kwargs.pop(name, None)
    kwargs["concurrency"] = min(concurrency, _THREADS) if async_sampling else 0
    return kwargs, queue.SimpleQueue() if async_sampling else None
