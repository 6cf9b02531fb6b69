r"""One worker of ``partpar demo``: the main job in its shortest form."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, datasets, training
from partpar.models import GCN


def main(folder: str, num_nodes: int, epochs: int) -> None:
    r"""Trains a GCN on the planted graph, in float64, and writes its losses to ``folder/{world_size}.jsonl``.

    Args:
        folder: For the partition and the losses.
        num_nodes: Of the graph.
        epochs: To train.
    """
    with training.init(device="cpu") as worker:

        def cut() -> None:
            graph = GraphData.from_pyg_data(datasets.planted(num_nodes))
            graph.partition_graph(folder, worker.world_size)

        training.first_rank(cut, worker.group)
        training.forget_peak_memory()
        share = GraphData.load_partition(folder, worker.rank, worker.world_size)
        share.node("dst")["x"] = share.node("dst")["x"].double()
        route = share.to_route(worker.group)
        torch.manual_seed(0)
        model: torch.nn.Module = GCN(share.node("dst")["x"].size(1), 64, 2, 8, dropout=0.5).double()
        if worker.world_size > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        log = training.JsonLines(f"{folder}/{worker.world_size}.jsonl", worker.rank)
        history = training.fit(
            model, optimizer, share, route, epochs, on_epoch=log.write, progress=worker.is_first
        )
        if worker.is_first:
            Console().print(training.summary_table(history))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
