r"""GraphSAGE, partition-parallel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch_geometric.typing import OptPairTensor

from partpar.nn.rows import check_edges, check_flow, with_halo
from partpar.route import Route


class SAGEConv(pyg_nn.SAGEConv):
    r"""The GraphSAGE operator of `"Inductive Representation Learning on Large Graphs"
    <https://arxiv.org/abs/1706.02216>`_, partition-parallel.

    .. math::
        \mathbf{x}^{\prime}_i = \mathbf{W}_1 \mathbf{x}_i + \mathbf{W}_2 \cdot \mathrm{mean}_{j \in
        \mathcal{N(i)}}
        \mathbf{x}_j

    Arguments, parameters and ``state_dict`` are those of :class:`torch_geometric.nn.SAGEConv`; every
    aggregation of PyG that copes with a worker without nodes may be used.

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``, or :obj:`aggr` is ``"lstm"``, which fails on a
            worker without edges.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`, edges :math:`(2, E)`
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    propagate_type = {"x": OptPairTensor}

    def __init__(
        self, in_channels: int | tuple[int, int], out_channels: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        check_flow(self, self.flow)
        if any(isinstance(module, pyg_nn.LSTMAggregation) for module in self.modules()):
            raise ValueError(
                "SAGEConv: expected an aggregation that takes no edges for an answer, found 'lstm', which "
                "fails on a worker without edges; use 'mean', 'max' or another"
            )

    def forward(self, x: Tensor, edge_index: Tensor, route: Route | None = None) -> Tensor:
        r"""Runs the layer on owned rows.

        Args:
            x (torch.Tensor): The rows of the owned nodes.
            edge_index (torch.Tensor): The share's edges.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
        """
        check_edges(self, x, edge_index)
        sources = self.lin(x).relu() if self.project else x
        out = self.lin_l(self.propagate(edge_index, x=(with_halo(sources, route), x)))
        if self.root_weight:
            out = out + self.lin_r(x)
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out
