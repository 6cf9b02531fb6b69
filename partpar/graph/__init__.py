r"""The graph, whole or one worker's share of it."""

from partpar.graph.data import GraphData
from partpar.graph.frame import Frame
from partpar.graph.snapshots import Snapshot
from partpar.graph.structure import CSC, EDGE, NODE, EdgeType, Part, Windows

__all__ = ["CSC", "EDGE", "NODE", "EdgeType", "Frame", "GraphData", "Part", "Snapshot", "Windows"]
