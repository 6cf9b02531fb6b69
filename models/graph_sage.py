r"""GraphSAGE."""

from __future__ import annotations

from typing import Any

from partpar.models.basic_gnn import BasicGNN

from partpar.nn import SAGEConv


class GraphSAGE(BasicGNN):
    r"""The network of `"Inductive Representation Learning on Large Graphs"
    <https://arxiv.org/abs/1706.02216>`_ from :class:`~partpar.nn.SAGEConv` layers; arguments as for
    :class:`torch_geometric.nn.GraphSAGE`, see :class:`~partpar.models.BasicGNN`.
    """

    supports_edge_weight = False
    supports_edge_attr = False

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> SAGEConv:
        return SAGEConv(in_channels, out_channels, **kwargs)
