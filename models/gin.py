r"""Graph isomorphism network."""

from __future__ import annotations

from typing import Any

from partpar.models.basic_gnn import BasicGNN

from partpar.nn import MLP, GINConv


class GIN(BasicGNN):
    r"""The network of `"How Powerful are Graph Neural Networks?" <https://arxiv.org/abs/1810.00826>`_ from
    :class:`~partpar.nn.GINConv` layers, each with a perceptron of two layers; arguments as for
    :class:`torch_geometric.nn.GIN`, see :class:`~partpar.models.BasicGNN`.
    """

    supports_edge_weight = False
    supports_edge_attr = False

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> GINConv:
        mlp = MLP(
            [in_channels, out_channels, out_channels],
            act=self.act,
            act_first=self.act_first,
            norm=self.norm,
            norm_kwargs=self.norm_kwargs,
        )
        return GINConv(mlp, **kwargs)
