r"""What cutting a graph will take, before it is cut: memory and sizes of the files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partpar.errors import PartitionError
from partpar.graph import GraphData
from partpar.partition.write import canonical

# Bytes for each node, and for each entry of the symmetric adjacency, that assigning holds at its peak beside the loaded
# graph. From above to what benchmarks/partition.py measured on six graphs of 15,000 to 330,000 nodes.
BYTES = {
    "metis": (40, 95),
    "multi-constraint-metis": (60, 108),
    "ldg": (160, 42),
    "random": (85, 12),
}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Forecast:
    r"""Bytes.

    Args:
        memory: That cutting needs beside the loaded graph, at most.
        graph: Of the loaded graph: attributes and edges.
        files: Of all shares, if no edge is cut.
        halo: What halos may add to that at most.
    """

    memory: int
    graph: int
    files: int
    halo: int


def forecast(graph: GraphData, num_parts: int, algorithm: str) -> Forecast:
    r"""Predicts memory and sizes from numbers of nodes and edges alone.

    Args:
        graph: A whole graph.
        num_parts: Number of parts.
        algorithm: As for :meth:`partpar.GraphData.partition_graph`.

    Raises:
        PartitionError: If memory cannot be predicted for the algorithm.
    """
    name = canonical(algorithm)
    if name not in BYTES:
        raise PartitionError(f"algorithm {name!r}: expected one of {', '.join(BYTES)} to predict its memory")
    if isinstance(num_parts, bool) or not isinstance(num_parts, int) or num_parts < 1:
        raise PartitionError(f"num_parts: expected an integer of at least 1, found {num_parts!r}")
    nodes, edges = sum(map(graph.num_nodes, graph.node_types)), sum(map(graph.num_edges, graph.edge_types))
    for_node, for_entry = BYTES[name]
    attributes = sum(v.numel() * v.element_size() for t in graph.node_types for v in graph.node(t).values())
    attributes += sum(v.numel() * v.element_size() for e in graph.edge_types for v in graph.edge(e).values())
    index = 4 if max(map(graph.num_nodes, graph.node_types), default=0) < 2**31 else 8
    in_types = sum(graph.num_nodes(e[2]) + num_parts for e in graph.edge_types)
    files = attributes + 8 * nodes + (8 + index) * edges + 8 * in_types
    entries = sum((1 if e[0] == e[2] and is_symmetric(graph.edge_index(e)) else 2) * graph.num_edges(e) for e in graph.edge_types)
    # A node is a halo node of a part at most once for each of its out-edges, and of each other part.
    halo = 16 * min(edges, (num_parts - 1) * nodes)
    # Writing holds one share and the order of all edges; the memory of the assignment may not have gone back by then.
    memory = for_node * nodes + for_entry * entries + files // num_parts + 24 * (nodes + edges)
    return Forecast(memory, attributes + 16 * edges, files, halo)


def is_symmetric(edge_index: Tensor) -> bool:
    r"""Whether the reverse of every edge is there as often as itself, by sums of hashes: in little memory, and wrong with
    a chance of about ``2**-60``."""
    difference = torch.zeros((), dtype=torch.int64)
    for source, target in zip(*(row.split(_CHUNK) for row in edge_index), strict=True):
        difference += (_hash(source, target) - _hash(target, source)).sum()
    return int(difference) == 0


def _hash(a: Tensor, b: Tensor) -> Tensor:
    r"""Mixes two numbers as splitmix64 does; sums and products wrap around."""
    mixed = a * -7046029254386353131 + b * 3243254565742157147
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    return (mixed ^ (mixed >> 27)) * -7723592293110705685
