r"""Predicting the next snapshot's edges, each by the owner of its destination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partpar.graph import Snapshot
from partpar.kernels import counter
from partpar.route import Route


@dataclass(frozen=True)
class Pairs:
    r"""The edges of a snapshot and as many that are none, between nodes that need not be in any halo.

    Args:
        route: Brings the row of each pair's source; built of their raw ids.
        destination: ``[P]`` int64, the owned row of each pair's destination.
        label: ``[P]`` float, 1 for edges.
    """

    route: Route
    destination: Tensor
    label: Tensor


def make_pairs(snapshot: Snapshot, num_nodes: int, seed: int, group: Any, dtype: torch.dtype) -> Pairs:
    r"""Pairs each edge into an owned node with one from a random source (collective). What is drawn depends on seed,
    snapshot and raw edge id alone, so any number of workers draws the same.

    Args:
        snapshot: Whose edges are to be predicted.
        num_nodes: Of the whole graph.
        seed: Of the random sources.
        group: The route's process group.
        dtype: Of the labels.
    """
    share = snapshot.share
    sources, destination = share.edge_index()
    draws = counter.uniform(seed, snapshot.index, 0, share.edge()["raw_ids"], 1, torch.float64).squeeze(1)
    raw_ids = torch.cat([share.node("src")["raw_ids"][sources], (draws * num_nodes).long()])
    label = torch.cat([torch.ones_like(draws), torch.zeros_like(draws)]).to(dtype)
    route = Route.from_raw_ids(raw_ids, share.node("dst")["raw_ids"], group)
    return Pairs(route, destination.repeat(2), label)
