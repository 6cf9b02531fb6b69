r"""A recurrent network over the snapshots of a temporal graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from partpar.kernels.adjacency import Adjacency
from partpar.nn import GCNConv, SourceRows
from partpar.route import Route


class RecurrentGCN(torch.nn.Module):
    r"""Two graph convolutions over a snapshot, and a gated recurrent unit for each node over time; after the manner of
    `"Structured Sequence Modeling with Graph Convolutional Recurrent Networks" <https://arxiv.org/abs/1612.07659>`_.

    The hidden state of a node belongs to its owner as any row does, so the recurrence sends nothing. :meth:`score` says
    how likely an edge is from the states of its ends.

    Args:
        in_channels (int): Size of each input row.
        hidden_channels (int): Size of each state.
    """

    def __init__(self, in_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.first = GCNConv(in_channels, hidden_channels)
        self.second = GCNConv(hidden_channels, hidden_channels)
        self.cell = torch.nn.GRUCell(hidden_channels, hidden_channels)
        self.decoder = torch.nn.Linear(hidden_channels, hidden_channels)

    def forward(
        self,
        x: Tensor | SourceRows,
        edge_index: Tensor | Adjacency,
        state: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        r"""One step in time (collective).

        Args:
            x: ``[num_owned, in_channels]``, or constant rows with their halo.
            edge_index: The snapshot's edges.
            state: ``[num_owned, hidden_channels]`` after the snapshot before; by default zeros.
            route: Of the snapshot.

        Returns:
            ``[num_owned, hidden_channels]``.
        """
        hidden = self.second(F.relu(self.first(x, edge_index, route)), edge_index, route)
        out: Tensor = self.cell(hidden, state)
        return out

    def score(self, source: Tensor, destination: Tensor) -> Tensor:
        r"""``[P]`` logits from the states ``[P, hidden_channels]`` of both ends."""
        return (self.decoder(source) * destination).sum(-1)
