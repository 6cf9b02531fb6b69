r"""Sub-graphs whose edges lead both ways."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from partpar.graph import EdgeType
from partpar.sampling.subgraph import SampledSubgraph


def to_bidirectional(out: SampledSubgraph) -> SampledSubgraph:
    r"""Adds the reverse of every edge, each once, sorted by destination, as
    :meth:`torch_geometric.sampler.HeteroSamplerOutput.to_bidirectional` does: within one node type to the same edges,
    else to those of the type that leads back, which is ``rev_…`` by name or the only one between the two.

    An edge and its reverse keep the id of the one that was found first. Edges of two types made one have none.
    """
    row, col, edge = dict(out.row), dict(out.col), dict(out.edge)
    rows = None if out.edge_rows is None else dict(out.edge_rows)
    for edge_type in out.row:
        src, name, dst = edge_type
        if name.startswith("rev_"):
            continue
        back = (dst, f"rev_{name}", src)
        if src == dst and back not in out.row:
            row[edge_type], col[edge_type], first = _both(out, edge_type, edge_type)
            at = first % max(out.row[edge_type].numel(), 1)
            edge[edge_type] = _take(out.edge[edge_type], at)
            if rows is not None:
                rows[edge_type] = _take(rows[edge_type], at)
            continue
        named = back in out.row
        others = [t for t in out.row if (t[0], t[2]) == (dst, src)]
        if not named and len(others) != 1:
            warnings.warn(
                f"expected one edge type that leads back from {dst!r} to {src!r} for {edge_type}, found {others}; "
                f"its edges stay as they are",
                stacklevel=2,
            )
            continue
        back = back if named else others[0]
        row[edge_type], col[edge_type], _ = _both(out, edge_type, back)
        changed = [edge_type]
        if named:
            row[back], col[back] = col[edge_type], row[edge_type]
            changed.append(back)
        for one in changed:
            edge[one] = None
            if rows is not None:
                rows[one] = None
    return replace(
        out, row=row, col=col, edge=edge, edge_rows=rows, num_sampled_nodes=None, num_sampled_edges=None
    )


def _both(out: SampledSubgraph, there: EdgeType, back: EdgeType) -> tuple[Tensor, Tensor, Tensor]:
    r"""Edges there and those back turned round, each pair of ends once, by destination and source; and where the first
    of each stood."""
    row = torch.cat([out.row[there], out.col[back]])
    col = torch.cat([out.col[there], out.row[back]])
    width = int(row.max()) + 1 if row.numel() else 1
    keys, order = (col * width + row).sort(stable=True)
    first = order[torch.cat([keys.new_ones(min(1, keys.numel()), dtype=torch.bool), keys[1:] != keys[:-1]])]
    return row[first], col[first], first


def _take(column: Tensor | None, at: Tensor) -> Tensor | None:
    return None if column is None else column[at]
