r"""What cutting a graph will take, before it is cut: memory and sizes of the files."""

from __future__ import annotations

from dataclasses import dataclass

from partpar.errors import PartitionError
from partpar.graph import GraphData
from partpar.partition.write import canonical

# Bytes for each node and for each edge that a process holds at its peak beside the loaded graph. Fitted from above to
# runs of benchmarks/partition.py, graphs of 10,000 to 330,000 nodes; see docs/performance.rst.
_BYTES = {
    "metis": (190, 110),
    "multi-constraint-metis": (270, 130),
    "ldg": (110, 40),
    "random": (40, 18),
}


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
    if name not in _BYTES:
        raise PartitionError(f"algorithm {name!r}: expected one of {', '.join(_BYTES)} to predict its memory")
    if num_parts < 1:
        raise PartitionError(f"num_parts: expected a number of at least 1, found {num_parts}")
    nodes, edges = sum(map(graph.num_nodes, graph.node_types)), sum(map(graph.num_edges, graph.edge_types))
    for_node, for_edge = _BYTES[name]
    attributes = sum(v.numel() * v.element_size() for t in graph.node_types for v in graph.node(t).values())
    attributes += sum(v.numel() * v.element_size() for e in graph.edge_types for v in graph.edge(e).values())
    index = 4 if max(map(graph.num_nodes, graph.node_types), default=0) < 2**31 else 8
    in_types = sum(graph.num_nodes(e[2]) + num_parts for e in graph.edge_types)
    files = attributes + 8 * nodes + (8 + index) * edges + 8 * in_types
    # A node is a halo node of a part at most once for each of its out-edges, and of each other part.
    halo = 16 * min(edges, (num_parts - 1) * nodes)
    # Writing holds one share beside the graph, and the order of all edges.
    memory = max(for_node * nodes + for_edge * edges, files // num_parts + 24 * (nodes + edges))
    return Forecast(memory, attributes + 16 * edges, files, halo)
