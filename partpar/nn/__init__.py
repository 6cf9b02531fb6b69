r"""Layers, norms and losses that take a route."""

from partpar.nn.dropout import Dropout
from partpar.nn.gat import GATConv, GATv2Conv
from partpar.nn.gcn import GCNConv
from partpar.nn.gin import GINConv, GINEConv
from partpar.nn.loss import global_mean
from partpar.nn.matrix import AdjacencyMatrix
from partpar.nn.mlp import MLP
from partpar.nn.norm import BatchNorm, SyncBatchNorm
from partpar.nn.routed import RoutedConv
from partpar.nn.sage import SAGEConv
from partpar.nn.source_rows import SourceRows, keep_halo

__all__ = [
    "MLP",
    "AdjacencyMatrix",
    "BatchNorm",
    "Dropout",
    "GATConv",
    "GATv2Conv",
    "GCNConv",
    "GINConv",
    "GINEConv",
    "RoutedConv",
    "SAGEConv",
    "SourceRows",
    "SyncBatchNorm",
    "global_mean",
    "keep_halo",
]
