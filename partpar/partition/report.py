r"""The quality report of a partition: what it costs to train on it.

Words: an edge is *cut* when its ends have different owners; the *communication volume* is the number of rows that one
exchange moves, which is the sum of all halos; the *replication factor* is how many copies of a node exist on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from partpar.partition.cut import ShareCounts

Report = dict[str, Any]


def quality_report(
    counts: list[ShareCounts], constraints: Mapping[str, np.ndarray], widths: Mapping[str, int]
) -> Report:
    r"""Summarises a partition.

    Args:
        counts: Of each share.
        constraints: For each constraint, its sum over the owned nodes of each part, ``[num_parts]``.
        widths: Columns of the features ``x`` of each node type that has some.

    Returns:
        A JSON-able mapping. ``traffic[q][p]`` is the number of rows that part q sends to part p in one exchange;
        ``balance`` gives max / mean over the parts, of each constraint, node type and edge type; bytes are those of float32 rows.
    """
    node_types, edge_types = list(counts[0].owned), list(counts[0].edges)
    nodes: dict[str, Any] = {}
    edges: dict[str, Any] = {}
    for node_type in node_types:
        owned = [c.owned[node_type] for c in counts]
        halo_from = np.array([c.halo_from[node_type] for c in counts], dtype=np.int64).reshape(
            len(counts), -1
        )
        halo = halo_from.sum(1)
        width = widths.get(node_type)
        nodes[node_type] = {
            "owned": owned,
            "balance": _imbalance(np.array(owned)),
            "halo": halo.tolist(),
            "traffic": halo_from.T.tolist(),
            "communication_volume": int(halo.sum()),
            "halo_share": _ratio(halo.sum(), halo.sum() + sum(owned)),
            "replication_factor": _ratio(halo.sum() + sum(owned), sum(owned)),
            "bytes_per_exchange_and_column": int(halo.sum()) * 4,
            **({} if width is None else {"bytes_per_exchange_of_x": int(halo.sum()) * 4 * width}),
        }
    for edge_type in edge_types:
        of_part = [c.edges[edge_type] for c in counts]
        cut = [c.cut_edges[edge_type] for c in counts]
        edges["__".join(edge_type)] = {
            "edges": of_part,
            "balance": _imbalance(np.array(of_part)),
            "cut_edges": cut,
            "edge_cut": _ratio(sum(cut), sum(of_part)),
        }
    num_edges = sum(sum(e["edges"]) for e in edges.values())
    volume, owned_all = (sum(sum(n[key]) for n in nodes.values()) for key in ("halo", "owned"))
    balance = {
        "#nodes": _imbalance(np.sum([n["owned"] for n in nodes.values()], axis=0)),
        "#in_edges": _imbalance(np.sum([e["edges"] for e in edges.values()], axis=0)) if edges else 1.0,
        **{name: _imbalance(sums) for name, sums in constraints.items() if name not in ("#nodes", "#in_edges")},
    }
    return {
        "num_nodes": owned_all,
        "num_edges": num_edges,
        "edge_cut": _ratio(sum(sum(e["cut_edges"]) for e in edges.values()), num_edges),
        "communication_volume": volume,
        "halo_share": _ratio(volume, volume + owned_all),
        "replication_factor": _ratio(volume + owned_all, owned_all),
        "balance": balance,
        "constraints": {
            name: np.asarray(sums, dtype=np.float64).tolist() for name, sums in constraints.items()
        },
        "nodes": nodes,
        "edges": edges,
    }


def _ratio(a: float, b: float) -> float:
    return float(a) / float(b) if b else 0.0


def _imbalance(sums: np.ndarray) -> float:
    r"""Largest part over the mean part; 1 is perfect."""
    mean = float(np.mean(sums))
    return float(np.max(sums)) / mean if mean else 1.0
