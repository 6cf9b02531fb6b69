r"""Ratios of ``full_graph.py`` and what they are to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ONE, TWO, PYG, ADJ_T = "partpar 1 x 2", "partpar 2 x 1", "PyG edge_index", "PyG adj_t"


@dataclass(frozen=True)
class Claim:
    r"""What is to hold, the figure found and whether it does."""

    text: str
    found: float
    holds: bool


def ratios(results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    r"""Ours over theirs, from what was measured: ``results[model][contender]``."""
    told: dict[str, float] = {}

    def compare(name: str, model: str, quantity: str, ours: str, theirs: str) -> None:
        rows = results.get(model, {})
        if ours in rows and theirs in rows:
            told[name] = rows[ours][quantity] / rows[theirs][quantity]

    for model in ("gcn", "sage"):
        compare(f"{model}_time_vs_pyg_edge_index", model, "seconds", TWO, PYG)
        compare(f"{model}_time_vs_pyg_adj_t", model, "seconds", TWO, ADJ_T)
        compare(f"{model}_time_vs_pyg_adj_t_huge_pages", model, "seconds", TWO, f"{ADJ_T}, huge pages")
        compare(f"{model}_features_sent_time_vs_pyg_adj_t", model, "seconds", f"{TWO}, features sent", ADJ_T)
        compare(f"{model}_two_ranks_speed_vs_one_rank", model, "seconds", ONE, TWO)
        compare(f"{model}_memory_vs_one_rank", model, "peak", TWO, ONE)
        compare(f"{model}_memory_vs_pyg_edge_index", model, "peak", TWO, PYG)
    compare("gat_time_vs_pyg", "gat", "seconds", TWO, PYG)
    compare("gat_two_ranks_speed_vs_one_rank", "gat", "seconds", ONE, TWO)
    compare("gat_memory_vs_pyg", "gat", "peak", TWO, PYG)
    again = f"{TWO}, recompute"
    for model, rows in results.items():
        compare(f"{model}_recompute_memory_ratio", model, "peak", again, TWO)
        compare(f"{model}_recompute_time_ratio", model, "seconds", again, TWO)
        if again in rows and TWO in rows:
            pairs = zip(rows[again]["gradient"], rows[TWO]["gradient"], strict=True)
            told[f"{model}_recompute_gradient_difference"] = max(abs(a - b) / max(b, 1e-30) for a, b in pairs)
    if "sage_recompute_memory_ratio" in told:
        told["recompute_memory_ratio"] = told["sage_recompute_memory_ratio"]

    sage = results.get("sage", {})
    for name, theirs in (("edge_index", PYG), ("adj_t", ADJ_T)):
        if TWO in sage and theirs in sage:
            ours, other = (sage[who]["seconds"] - sage[who]["dense"] for who in (TWO, theirs))
            told[f"sage_without_dense_time_vs_pyg_{name}"] = ours / other
    return told


AT_MOST = {
    "gcn_time_vs_pyg_edge_index": (
        1 / 9,
        "GCN, 2 ranks x 1 thread, take at most 1/9 of the time of PyG edge_index",
    ),
    "gcn_time_vs_pyg_adj_t": (1 / 2.7, "GCN: at most 1/2.7 of the time of PyG adj_t"),
    "gcn_memory_vs_one_rank": (0.6, "GCN: peak memory of a rank of two at most 0.6 of one alone"),
    "gcn_memory_vs_pyg_edge_index": (0.2, "GCN: peak memory of a rank at most 0.2 of PyG edge_index"),
    "sage_without_dense_time_vs_pyg_edge_index": (
        1 / 9,
        "GraphSAGE without dense layers: at most 1/9 of PyG edge_index",
    ),
    "sage_without_dense_time_vs_pyg_adj_t": (
        1 / 2.7,
        "GraphSAGE without dense layers: at most 1/2.7 of PyG adj_t",
    ),
    "gat_time_vs_pyg": (1 / 4, "GAT: at most 1/4 of PyG's time"),
    "gat_memory_vs_pyg": (0.3, "GAT: at most 0.3 of PyG's memory"),
    "recompute_memory_ratio": (0.65, "GraphSAGE: recomputing leaves at most 0.65 of the peak memory"),
    **{
        f"{model}_recompute_gradient_difference": (1e-6, f"{name}: recomputing leaves gradients as they are")
        for model, name in (("gcn", "GCN"), ("sage", "GraphSAGE"), ("gat", "GAT"))
    },
    "max_vs_sum_1_thread": (3, "max takes at most 3 times as long as sum, 1 thread"),
    "max_vs_sum_2_threads": (3, "max takes at most 3 times as long as sum, 2 threads"),
}
AT_LEAST = {
    "gcn_two_ranks_speed_vs_one_rank": (
        0.95,
        "GCN: 2 ranks x 1 thread at least 0.95 as fast as 1 rank x 2 threads",
    ),
    "sum_bound_share_1_thread": (0.65, "sum at least 0.65 of the bound of memory, 1 thread"),
    "sum_bound_share_2_threads": (0.65, "sum at least 0.65 of the bound of memory, 2 threads"),
    "weighted_bound_share_1_thread": (0.65, "weighted sum at least 0.65 of the bound of memory, 1 thread"),
    "weighted_bound_share_2_threads": (0.65, "weighted sum at least 0.65 of the bound of memory, 2 threads"),
}


def claims(told: dict[str, float]) -> list[Claim]:
    r"""Every target whose figure was measured."""
    most = [
        Claim(text, told[name], told[name] <= limit)
        for name, (limit, text) in AT_MOST.items()
        if name in told
    ]
    return most + [
        Claim(text, told[name], told[name] >= limit)
        for name, (limit, text) in AT_LEAST.items()
        if name in told
    ]
