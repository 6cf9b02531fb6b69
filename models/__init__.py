r"""Reference architectures, with the constructor arguments of PyG's model zoo and ``forward(x, edge_index,
route)``."""

from partpar.models.basic_gnn import BasicGNN
from partpar.models.distributed_gin import DistributedGIN, DistributedGINE
from partpar.models.gat import GAT
from partpar.models.gcn import GCN
from partpar.models.gin import GIN
from partpar.models.graph_sage import GraphSAGE
from partpar.models.recurrent import RecurrentGCN
from partpar.models.simple import SimpleConv, SimpleNet

__all__ = [
    "GAT",
    "GCN",
    "GIN",
    "BasicGNN",
    "DistributedGIN",
    "DistributedGINE",
    "GraphSAGE",
    "RecurrentGCN",
    "SimpleConv",
    "SimpleNet",
]
