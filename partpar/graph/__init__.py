r"""The graph, whole or one worker's share of it."""

from partpar.graph.data import CSC, EDGE, NODE, EdgeType, GraphData, Part
from partpar.graph.frame import Frame

__all__ = ["CSC", "EDGE", "NODE", "EdgeType", "Frame", "GraphData", "Part"]
