r"""Distributed neighbour sampling: the engine."""

from partpar.sampling.neighbor_sampler import NeighborSampler
from partpar.sampling.subgraph import BatchKey, LinkLabels, LinkSeeds, SampledSubgraph, Seeds

__all__ = ["BatchKey", "LinkLabels", "LinkSeeds", "NeighborSampler", "SampledSubgraph", "Seeds"]
