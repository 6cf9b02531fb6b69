r"""Layers, norms and losses that take a route."""

from partpar.nn.ahead import fetch_ahead
from partpar.nn.distributed_gin import DistributedGINConv, DistributedGINEConv
from partpar.nn.dropout import Dropout
from partpar.nn.gat import GATConv, GATv2Conv
from partpar.nn.gcn import GCNConv
from partpar.nn.gin import GINConv, GINEConv
from partpar.nn.han import HANConv
from partpar.nn.hetero_conv import HeteroConv, HeteroSAGEConv
from partpar.nn.hetero_rows import keep_halos
from partpar.nn.hgt import HGTConv
from partpar.nn.loss import global_mean
from partpar.nn.matrix import AdjacencyMatrix
from partpar.nn.mlp import MLP
from partpar.nn.norm import BatchNorm, SyncBatchNorm
from partpar.nn.rgcn import RGCNConv
from partpar.nn.route_model import route_model
from partpar.nn.routed import RoutedConv
from partpar.nn.sage import SAGEConv
from partpar.nn.source_rows import SourceRows, keep_halo

__all__ = [
    "MLP",
    "AdjacencyMatrix",
    "BatchNorm",
    "DistributedGINConv",
    "DistributedGINEConv",
    "Dropout",
    "GATConv",
    "GATv2Conv",
    "GCNConv",
    "GINConv",
    "GINEConv",
    "HANConv",
    "HGTConv",
    "HeteroConv",
    "HeteroSAGEConv",
    "RGCNConv",
    "RoutedConv",
    "SAGEConv",
    "SourceRows",
    "SyncBatchNorm",
    "fetch_ahead",
    "global_mean",
    "keep_halo",
    "keep_halos",
    "route_model",
]
