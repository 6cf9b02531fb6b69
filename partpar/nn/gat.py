r"""Graph attention, partition-parallel: every in-edge of an owned node is here, so its softmax is too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptPairTensor, OptTensor, PairTensor
from torch_geometric.utils import add_self_loops, remove_self_loops, softmax

from partpar.kernels.adjacency import Adjacency
from partpar.kernels.aggregate import aggregate_gat
from partpar.nn.dropout import AttentionDropout
from partpar.nn.neighbourhood import edge_index_of, with_self_loops
from partpar.nn.rows import Rows, check_edges, check_owned_first, of_block, owned, through
from partpar.route import Route

Attention = tuple[Tensor, tuple[Tensor, Tensor]]


class GATConv(AttentionDropout, pyg_nn.GATConv):
    r"""The graph attention operator of `"Graph Attention Networks" <https://arxiv.org/abs/1710.10903>`_,
    partition-parallel.

    .. math::
        \mathbf{x}^{\prime}_i = \sum_{j \in \mathcal{N}(i) \cup \{ i \}}
        \alpha_{i,j}\mathbf{\Theta}_t\mathbf{x}_{j}

    Arguments and parameters are those of :class:`torch_geometric.nn.GATConv`, as is the ``state_dict`` but
    for the step counter of attention dropout. Its draws are keyed by the raw ids of both ends and the head,
    so that they are the same for any number of workers; parallel edges share them.

    Args:
        in_channels (int or tuple): Size of each row; a tuple gives sources and destinations a linear map
            each.
        out_channels (int): Size of each row of each head.
        *args (optional): Further arguments of :class:`torch_geometric.nn.GATConv`, by place.
        **kwargs (optional): The same, by name.
        seed (int, optional): The seed of attention dropout. (default: :obj:`0`)
        layer (int, optional): The layer's number for attention dropout, see :class:`~partpar.nn.Dropout`.
            (default: :obj:`None`)

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`, edge attributes :math:`(E,
          D)` *(optional)*
        - **outputs:** :math:`(N_{owned}, H * F_{out})`; with :obj:`return_attention_weights=True` also the
          edges, self-loops last, and their weights :math:`(E^{\prime}, H)`
    """

    propagate_type = {"x": OptPairTensor, "alpha": Tensor}
    edge_updater_type = {"alpha": OptPairTensor, "edge_attr": OptTensor}

    def forward(
        self,
        x: Rows,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | Attention:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor or SourceRows): The rows of the owned nodes, or constant rows with their halo.
            edge_index (torch.Tensor or Adjacency): The share's edges; ``share.adj()`` is the fast way.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
            edge_attr (torch.Tensor, optional): A row for each edge.
            return_attention_weights (bool, optional): Whether to return the edges and their weights too.
        """
        x = of_block(x, edge_index, route)
        check_edges(self, x, edge_index, route, edge_attr=edge_attr)
        check_owned_first(self, route)
        heads = (-1, self.heads, self.out_channels)
        if self.lin is not None:
            x_src, x_dst = (rows.view(heads) for rows in through(self.lin, x, route))
        else:
            x_src, x_dst = through(self.lin_src, x, route)[0].view(heads), self.lin_dst(owned(x)).view(heads)
        scores = (_scores(x_src, self.att_src), _scores(x_dst, self.att_dst))

        if isinstance(edge_index, Adjacency):
            if not return_attention_weights:
                return self._by_kernel(owned(x), x_src, scores, edge_index, route, edge_attr)
            edge_index = edge_index_of(edge_index)
        x = owned(x)
        edge_index, edge_attr = _with_self_loops(self, edge_index, edge_attr, x.size(0))
        alpha = self.edge_updater(edge_index, alpha=scores, edge_attr=edge_attr)
        alpha = self.attention_dropout.drop_edges(alpha, edge_index, route)
        out = self.propagate(edge_index, x=(x_src, x_dst), alpha=alpha)
        return _finish(self, out, x, (edge_index, alpha) if return_attention_weights else None)

    def _by_kernel(
        self,
        x: Tensor,
        x_src: Tensor,
        scores: tuple[Tensor, Tensor],
        adj: Adjacency,
        route: Route | None,
        edge_attr: Tensor | None,
    ) -> Tensor:
        if self.add_self_loops:
            looped = with_self_loops(adj)
            if edge_attr is not None:
                _, edge_attr = _with_self_loops(self, edge_index_of(adj), edge_attr, x.size(0))
                assert looped.adj.edge_ids is not None
                edge_attr = edge_attr[looped.adj.edge_ids] if edge_attr is not None else None
            adj = looped.adj
        a_edge = None
        if edge_attr is not None and self.lin_edge is not None:
            a_edge = (_edge_heads(self, edge_attr) * self.att_edge).sum(-1)
        scale = None
        if self.training and self.dropout > 0.0:
            ones = x.new_ones(adj.num_edges, self.heads)
            scale = self.attention_dropout.drop_edges(ones, edge_index_of(adj), route)
        out = aggregate_gat(adj, x_src, scores[0], scores[1], a_edge, self.negative_slope, scale)
        finished = _finish(self, out, x, None)
        assert isinstance(finished, Tensor)
        return finished

    def edge_update(
        self,
        alpha_j: Tensor,
        alpha_i: Tensor,
        edge_attr: OptTensor,
        index: Tensor,
        ptr: OptTensor,
        dim_size: int | None,
    ) -> Tensor:
        # Unlike PyG's, it ends early for no edges neither, so that every worker uses every parameter.
        alpha = alpha_j + alpha_i
        if edge_attr is not None and self.lin_edge is not None:
            alpha = alpha + (_edge_heads(self, edge_attr) * self.att_edge).sum(-1)
        return softmax(F.leaky_relu(alpha, self.negative_slope), index, ptr, dim_size)


class GATv2Conv(AttentionDropout, pyg_nn.GATv2Conv):
    r"""The operator of `"How Attentive are Graph Attention Networks?" <https://arxiv.org/abs/2105.14491>`_,
    partition-parallel. All that is said of :class:`GATConv` holds for it and
    :class:`torch_geometric.nn.GATv2Conv`.
    """

    propagate_type = {"x": PairTensor, "alpha": Tensor}
    edge_updater_type = {"x": PairTensor, "edge_attr": OptTensor}

    def forward(
        self,
        x: Rows,
        edge_index: Tensor | Adjacency,
        route: Route | None = None,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | Attention:
        r"""Runs the layer on owned rows; see :meth:`GATConv.forward`."""
        x = of_block(x, edge_index, route)
        check_edges(self, x, edge_index, route, edge_attr=edge_attr)
        check_owned_first(self, route)
        heads = (-1, self.heads, self.out_channels)
        x_l, x_own = (rows.view(heads) for rows in through(self.lin_l, x, route))
        x = owned(x)
        x_r = x_own if self.share_weights else self.lin_r(x).view(heads)
        if isinstance(
            edge_index, Adjacency
        ):  # its logits are no sum of two ends' scores: each edge makes its own
            edge_index = edge_index_of(edge_index)
        edge_index, edge_attr = _with_self_loops(self, edge_index, edge_attr, x.size(0))
        alpha = self.edge_updater(edge_index, x=(x_l, x_r), edge_attr=edge_attr)
        alpha = self.attention_dropout.drop_edges(alpha, edge_index, route)
        out = self.propagate(edge_index, x=(x_l, x_r), alpha=alpha)
        return _finish(self, out, x, (edge_index, alpha) if return_attention_weights else None)

    def edge_update(
        self,
        x_j: Tensor,
        x_i: Tensor,
        edge_attr: OptTensor,
        index: Tensor,
        ptr: OptTensor,
        dim_size: int | None,
    ) -> Tensor:
        x = x_i + x_j
        if edge_attr is not None:
            if self.lin_edge is None:
                raise ValueError(
                    "GATv2Conv: expected edge_attr only with edge_dim, found it without; set edge_dim when "
                    "making the layer"
                )
            x = x + _edge_heads(self, edge_attr)
        alpha = (F.leaky_relu(x, self.negative_slope) * self.att).sum(-1)
        return softmax(alpha, index, ptr, dim_size)


def _scores(rows: Tensor, att: Tensor) -> Tensor:
    """``(rows * att).sum(-1)``, ``[N, H, C]`` to ``[N, H]``, as one product that makes nothing of the rows' size."""
    blocks = torch.block_diag(*att.squeeze(0).unsqueeze(2))
    return rows.flatten(1) @ blocks


def _edge_heads(conv: GATConv | GATv2Conv, edge_attr: Tensor) -> Tensor:
    """``[E]`` or ``[E, D]`` to ``[E, H, C]``."""
    rows = edge_attr.unsqueeze(1) if edge_attr.dim() == 1 else edge_attr
    return conv.lin_edge(rows).view(-1, conv.heads, conv.out_channels)


def _with_self_loops(
    conv: GATConv | GATv2Conv, edge_index: Tensor, edge_attr: Tensor | None, num_nodes: int
) -> tuple[Tensor, Tensor | None]:
    """One self-loop for every owned node; source ``i`` is node ``i``, as owned rows come first."""
    if not conv.add_self_loops:
        return edge_index, edge_attr
    edge_index, edge_attr = remove_self_loops(edge_index, edge_attr)
    return add_self_loops(edge_index, edge_attr, fill_value=conv.fill_value, num_nodes=num_nodes)


def _finish(
    conv: GATConv | GATv2Conv, out: Tensor, x: Tensor, attention: tuple[Tensor, Tensor] | None
) -> Tensor | Attention:
    """From the rows of each head to those of the layer."""
    out = out.view(-1, conv.heads * conv.out_channels) if conv.concat else out.mean(dim=1)
    if conv.res is not None:
        out = out + conv.res(x)
    if conv.bias is not None:
        out = out + conv.bias
    return out if attention is None else (out, attention)
