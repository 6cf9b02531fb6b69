r"""Cuts a graph anew in the place of a partition: ``replace.py FOLDER SEED [by two renames]``."""

from __future__ import annotations

import sys

from graphs import directed_graph

from partpar import GraphData
from partpar.partition import write

if __name__ == "__main__":
    if sys.argv[3:]:
        write._swap = lambda one, other: False
    graph = GraphData.from_pyg_data(directed_graph(seed=int(sys.argv[2])))
    graph.partition_graph(sys.argv[1], 2, algorithm="random", overwrite=True)
