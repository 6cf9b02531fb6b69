r"""The names of ``torch_geometric.distributed`` over partpar's serving and sampling: a script or test that was written for
it runs after its import lines are changed. Partitions are partpar's own, ids that go in and come out are raw ids."""

from partpar.distributed import event_loop, rpc, utils
from partpar.distributed.dist_context import DistContext, DistRole
from partpar.distributed.dist_link_neighbor_loader import DistLinkNeighborLoader
from partpar.distributed.dist_loader import DistLoader
from partpar.distributed.dist_neighbor_loader import DistNeighborLoader
from partpar.distributed.dist_neighbor_sampler import DistNeighborSampler
from partpar.distributed.local_feature_store import LocalFeatureStore
from partpar.distributed.local_graph_store import LocalGraphStore
from partpar.distributed.partition import Partitioner, load_partition_info

__all__ = [
    "DistContext",
    "DistLinkNeighborLoader",
    "DistLoader",
    "DistNeighborLoader",
    "DistNeighborSampler",
    "DistRole",
    "LocalFeatureStore",
    "LocalGraphStore",
    "Partitioner",
    "event_loop",
    "load_partition_info",
    "rpc",
    "utils",
]
