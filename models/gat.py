r"""Graph attention network."""

from __future__ import annotations

from typing import Any

from partpar.models.basic_gnn import BasicGNN

from partpar.nn import GATConv, GATv2Conv


class GAT(BasicGNN):
    r"""The network of `"Graph Attention Networks" <https://arxiv.org/abs/1710.10903>`_, or with
    :obj:`v2=True` of `"How Attentive are Graph Attention Networks?" <https://arxiv.org/abs/2105.14491>`_,
    from :class:`~partpar.nn.GATConv` or :class:`~partpar.nn.GATv2Conv` layers; arguments as for
    :class:`torch_geometric.nn.GAT`, see :class:`~partpar.models.BasicGNN`.

    Raises:
        ValueError: Heads are concatenated and do not divide the channels.
    """

    supports_edge_weight = False
    supports_edge_attr = True

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> GATConv | GATv2Conv:
        v2, heads, concat = kwargs.pop("v2", False), kwargs.pop("heads", 1), kwargs.pop("concat", True)
        if getattr(self, "_is_conv_to_out", False):  # the last layer averages its heads
            concat = False
        if concat:
            if out_channels % heads != 0:
                raise ValueError(
                    f"GAT: expected heads to divide the {out_channels} channels of a layer, found {heads}"
                )
            out_channels //= heads
        conv = GATv2Conv if v2 else GATConv
        number = 2 * len(self.convs) + 1  # odd: even ones are for the dropout of rows
        return conv(
            in_channels,
            out_channels,
            heads=heads,
            concat=concat,
            dropout=self.dropout.p,
            seed=self._seed,
            layer=number,
            **kwargs,
        )
