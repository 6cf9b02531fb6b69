r"""Rows that other parts own, kept here within a bound.

What is worth keeping is known before the first batch: a halo row is drawn the more often, the fewer other neighbours
its destinations have (expected draws, in the spirit of the static caches of PaGraph, Lin et al., 2020, which rank by
degree). The halo is kept in that order, as far as the bound allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from partpar.graph import GraphData
from partpar.kernels.kept import expected_draws, split_kept
from partpar.kernels.relabel import new_table, number_seeds

FetchRows = Callable[[Tensor], Tensor]
_BATCH_BYTES = 8 << 20  # rows are brought in batches, so that loading needs little beside what is kept


@dataclass
class _Ranking:
    """Halo ids of one node type, the most wanted first, and their numbers in that order."""

    ids: Tensor
    table: np.ndarray


@dataclass
class Kept:
    r"""The kept rows of one attribute, and how often they were of use."""

    rows: Tensor
    hits: int = 0
    misses: int = 0
    table: np.ndarray = field(repr=False, default_factory=lambda: new_table(1))

    def split(
        self, ids: Tensor, order: Tensor, local: Tensor, counts: Tensor, own: int
    ) -> tuple[Tensor, Tensor]:
        r"""Takes what is kept out of a request; see :func:`partpar.kernels.kept.split_kept`.

        Returns:
            The rows here and their places in the request.
        """
        slots, places = torch.empty_like(order), torch.empty_like(order)
        num = split_kept(
            self.table,
            self.rows.size(0),
            *(t.numpy() for t in (ids, order, local, counts)),
            own,
            slots.numpy(),
            places.numpy(),
        )
        self.hits += num
        self.misses += int(counts.sum() - counts[own])
        return slots[:num], places[:num]


class RowCache:
    r"""Rows of the halo's attributes.

    Args:
        share: Whose halo.
        max_bytes: Of all kept rows together; 0 keeps none.
    """

    def __init__(self, share: GraphData, max_bytes: int) -> None:
        self.share, self.left = share, max_bytes
        self._rankings: dict[str, _Ranking] = {}
        self._kept: dict[tuple[str, str], Kept] = {}
        self._changing: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def get(self, node_type: str, name: str, fetch: FetchRows) -> Kept | None:
        r"""What is kept of an attribute, brought here when it is first asked for; :obj:`None` for nothing.

        Args:
            node_type: Of the attribute.
            name: Of the attribute.
            fetch: Brings rows by ids from their owners.
        """
        key = (node_type, name)
        kept = self._kept.get(key)
        if kept is not None or self.left <= 0 or key in self._changing:
            return kept
        with self._lock:  # who comes second finds it done
            if key not in self._kept and key not in self._changing:
                ranking = self._ranking(node_type)
                rows = self._load(ranking.ids, fetch)
                if key not in self._changing:  # else they changed meanwhile
                    self._kept[key] = Kept(rows, table=ranking.table)
                    self.left -= rows.nbytes
            return self._kept.get(key)

    def forget(self, node_type: str, name: str) -> None:
        r"""Drops an attribute for good: somebody changes its rows."""
        self._changing.add((node_type, name))
        self._kept.pop((node_type, name), None)

    def report(self) -> dict[tuple[str, str], dict[str, float]]:
        r"""For each attribute, rows kept, hits and misses among the rows that others own, and the hit rate."""
        return {
            key: {
                "rows": kept.rows.size(0),
                "hits": kept.hits,
                "misses": kept.misses,
                "hit_rate": kept.hits / max(kept.hits + kept.misses, 1),
            }
            for key, kept in self._kept.items()
        }

    def _ranking(self, node_type: str) -> _Ranking:
        if node_type not in self._rankings:
            share = self.share
            draws = np.zeros(share.node(node_type, "src").num_rows)
            for edge_type in share.edge_types:
                if edge_type[0] == node_type:
                    indptr, indices = share.csc(edge_type)
                    expected_draws(indptr.numpy(), indices.numpy(), draws)
            owned = share.num_owned(node_type)
            wanted_first = np.argsort(-draws[owned:], kind="stable")
            ids = share.node(node_type, "src")["ids"][owned:][torch.from_numpy(wanted_first)]
            table = new_table(ids.numel())
            number_seeds(table, ids.numpy())
            self._rankings[node_type] = _Ranking(ids, table)
        return self._rankings[node_type]

    def _load(self, ids: Tensor, fetch: FetchRows) -> Tensor:
        first = fetch(ids[:1])
        row_bytes = max(first[:1].nbytes, 1)
        num = min(ids.numel(), self.left // row_bytes) if ids.numel() else 0
        rows = first.new_empty((num, *first.shape[1:]))
        step = max(_BATCH_BYTES // row_bytes, 1)
        for low in range(0, num, step):
            rows[low : low + step] = fetch(ids[low : min(low + step, num)])
        return rows
