r"""The smallest partition-parallel network: a plain :class:`~torch_geometric.nn.MessagePassing` layer and one
line."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor

from partpar.route import Route


class SimpleConv(pyg_nn.MessagePassing):
    r"""The mean of the neighbours, a linear map and ReLU: the pattern for layers of one's own.

    Args:
        in_channels (int): Size of each input row.
        out_channels (int): Size of each output row.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="mean")
        self.linear = torch.nn.Linear(in_channels, out_channels)

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters."""
        super().reset_parameters()
        self.linear.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, route: Route) -> Tensor:
        r"""``[num_owned, in_channels]`` to ``[num_owned, out_channels]``."""
        dst_len = x.size(0)
        x = route.apply(x)  # the one line: [num_owned, *] -> [num_owned + num_halo, *]
        out: Tensor = self.propagate(edge_index, x=x)
        return out[:dst_len]

    def message(self, x_j: Tensor) -> Tensor:
        return x_j

    def update(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class SimpleNet(torch.nn.Module):
    r"""Several :class:`SimpleConv` layers.

    Args:
        in_channels (int): Size of each input row.
        hidden_channels (int): Size of each hidden row.
        num_layers (int): Number of layers.
        out_channels (int, optional): Size of each output row, made by a final linear map; :obj:`None` gives
            the hidden rows. (default: :obj:`None`)
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, num_layers: int, out_channels: int | None = None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [hidden_channels] * num_layers
        self.convs = torch.nn.ModuleList(SimpleConv(a, b) for a, b in pairwise(widths))
        self.lin = torch.nn.Identity() if out_channels is None else torch.nn.Linear(widths[-1], out_channels)

    def reset_parameters(self) -> None:
        r"""Resets all learnable parameters."""
        for module in (*self.convs, self.lin):
            if not isinstance(module, torch.nn.Identity):
                module.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, route: Route) -> Tensor:
        r"""``[num_owned, in_channels]`` to ``[num_owned, out_channels]`` (collective)."""
        for conv in self.convs:
            x = conv(x, edge_index, route)
        return self.lin(x)
