r"""Train graph neural networks on graphs that one process cannot hold: the same numbers as one process, on any number
of workers."""

from partpar.graph import GraphData
from partpar.hetero_route import HeteroRoute
from partpar.route import Route
from partpar.training import init

__all__ = ["GraphData", "HeteroRoute", "Route", "init"]
