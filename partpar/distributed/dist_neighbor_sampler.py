r"""Under the name of the module that the original has it in."""

from typing import Any

from partpar.distributed.rpc import shutdown_rpc
from partpar.sampling.dist_sampler import DistNeighborSampler

__all__ = ["DistNeighborSampler", "close_sampler"]


def close_sampler(worker_id: int, sampler: Any) -> None:
    r"""Ends what a sampler was set up with; of early versions of the original."""
    if sampler.event_loop is not None:
        sampler.event_loop.shutdown_loop()
    shutdown_rpc()
