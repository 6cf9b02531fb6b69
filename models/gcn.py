r"""Graph convolutional network."""

from __future__ import annotations

from typing import Any

from partpar.models.basic_gnn import BasicGNN

from partpar.nn import GCNConv


class GCN(BasicGNN):
    r"""The network of `"Semi-supervised Classification with Graph Convolutional Networks"
    <https://arxiv.org/abs/1609.02907>`_ from :class:`~partpar.nn.GCNConv` layers; arguments as for
    :class:`torch_geometric.nn.GCN`, see :class:`~partpar.models.BasicGNN`.
    """

    supports_edge_weight = True
    supports_edge_attr = False

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> GCNConv:
        return GCNConv(in_channels, out_channels, **kwargs)
