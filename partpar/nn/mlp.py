r"""A multi-layer perceptron over the nodes of the whole graph."""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric.nn as pyg_nn
from torch import Tensor

from partpar.nn import rows
from partpar.nn.dropout import Dropout
from partpar.nn.norm import with_global_statistics
from partpar.route import Route


class MLP(pyg_nn.MLP):
    r"""PyG's multi-layer perceptron whose norms see all nodes and whose dropout draws by raw id.

    Arguments and parameters are those of :class:`torch_geometric.nn.MLP`.

    Args:
        *args (optional): Arguments of :class:`torch_geometric.nn.MLP`.
        seed (int, optional): The seed of dropout. (default: :obj:`0`)
        **kwargs (optional): Arguments of :class:`torch_geometric.nn.MLP`.

    Raises:
        ValueError: A norm has statistics over all rows and no partition-parallel counterpart.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F_{in})`
        - **outputs:** :math:`(N_{owned}, F_{out})`
    """

    norms: torch.nn.ModuleList

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms = torch.nn.ModuleList(with_global_statistics(norm, "MLP") for norm in self.norms)
        self.dropouts = torch.nn.ModuleList(Dropout(p, seed) for p in self.dropout)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        r"""Runs the perceptron on owned rows.

        Args:
            x (torch.Tensor): The rows of the owned nodes.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.
        """
        for lin, norm, dropout in zip(self.lins, self.norms, self.dropouts, strict=False):
            x = lin(x)
            if self.act is not None and self.act_first:
                x = self.act(x)
            x = rows.call(norm, x, route)
            if self.act is not None and not self.act_first:
                x = self.act(x)
            x = dropout(x, route)
        if self.plain_last:
            x = self.dropouts[-1](self.lins[-1](x), route)
        return x
