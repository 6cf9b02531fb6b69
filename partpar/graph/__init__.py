r"""The graph, whole or one worker's share of it."""

from partpar.graph.data import GraphData
from partpar.graph.frame import Frame
from partpar.graph.structure import CSC, EDGE, NODE, EdgeType, Part

__all__ = ["CSC", "EDGE", "NODE", "EdgeType", "Frame", "GraphData", "Part"]
