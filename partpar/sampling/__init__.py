r"""Distributed neighbour sampling: the engine, and loaders of nodes and of links."""

from partpar.sampling.blocks import blocks
from partpar.sampling.dist_sampler import DistNeighborSampler
from partpar.sampling.link_loader import DistLinkNeighborLoader
from partpar.sampling.loader import DistLoader
from partpar.sampling.neighbor_sampler import NeighborSampler
from partpar.sampling.node_loader import DistNeighborLoader
from partpar.sampling.subgraph import BatchKey, LinkLabels, LinkSeeds, SampledSubgraph, Seeds

__all__ = [
    "BatchKey",
    "DistLinkNeighborLoader",
    "DistLoader",
    "DistNeighborLoader",
    "DistNeighborSampler",
    "LinkLabels",
    "LinkSeeds",
    "NeighborSampler",
    "SampledSubgraph",
    "Seeds",
    "blocks",
]
