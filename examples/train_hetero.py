r"""Classifies authors in a bibliographic network with several types of nodes and edges, by any number of workers.

.. code-block:: console

    python examples/train_hetero.py --npz dblp_hetero.npz
    torchrun --standalone --nproc-per-node 2 examples/train_hetero.py --npz dblp_hetero.npz --model rgcn

Batches are PyG's ``HeteroData``, so models are PyG's own: ``to_hetero`` makes GraphSAGE one of many types, and
``HeteroConv`` and ``HGTConv`` take dictionaries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
import torch_geometric.transforms as T
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import HeteroData

from partpar import GraphData, datasets, training
from partpar.sampling import DistNeighborLoader


class Typed(torch.nn.Module):
    r"""A linear map for each type, or a learned row for each node of a type without features, then layers; what comes out
    is of one type.

    Args:
        sizes: Of each node type the number of nodes and their input columns.
        layers: Each ``(x_dict, edge_index_dict) -> x_dict``.
        target: The type that is classified.
        hidden: Columns of hidden rows.
        num_classes: Of the target.
    """

    def __init__(
        self, sizes: dict[str, tuple[int, int]], layers: list[torch.nn.Module], target: str, hidden: int, num_classes: int
    ) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleDict(
            {t: torch.nn.Linear(size, hidden) if size else torch.nn.Embedding(n, hidden) for t, (n, size) in sizes.items()}
        )
        self.layers, self.target = torch.nn.ModuleList(layers), target
        self.out = torch.nn.Linear(hidden, num_classes)

    def forward(self, batch: Any) -> Tensor:
        x = {
            t: F.dropout(self.maps[t](batch[t].x if "x" in batch[t] else batch[t].n_id).relu(), 0.5, self.training)
            for t in batch.node_types
        }
        for layer in self.layers:
            found = layer(x, batch.edge_index_dict)
            x = {t: F.dropout((x[t] + found[t]).relu() if t in found else x[t], 0.5, self.training) for t in x}
        return self.out(x[self.target][: batch[self.target].batch_size])


def rgcn(metadata: Any, hidden: int) -> torch.nn.Module:
    r"""A convolution with weights for each edge type, as in Schlichtkrull et al., "Modeling relational data with graph
    convolutional networks" (ESWC 2018)."""
    return pyg_nn.HeteroConv({t: pyg_nn.SAGEConv((hidden, hidden), hidden) for t in metadata[1]}, aggr="sum")


def sage(metadata: Any, hidden: int) -> torch.nn.Module:
    r"""GraphSAGE, made heterogeneous."""
    return pyg_nn.to_hetero(pyg_nn.GraphSAGE(hidden, hidden, 1), metadata, aggr="mean")


def hgt(metadata: Any, hidden: int) -> torch.nn.Module:
    r"""The heterogeneous graph transformer (Hu et al., WWW 2020)."""
    return pyg_nn.HGTConv(hidden, hidden, metadata, heads=2)


MODELS = {"sage": sage, "rgcn": rgcn, "hgt": hgt}


def main() -> None:
    r"""Sets up, partitions if need be, trains, and prints what came out."""
    args = parse()
    with training.init(timeout=args.timeout) as worker:
        training.first_rank(lambda: partition(args, worker.world_size), worker.group)
        share = GraphData.load_partition(root(args), worker.rank, worker.world_size)
        owned = share.node(args.target)
        loaders = {
            split: DistNeighborLoader(
                share,
                args.fanouts,
                (args.target, owned[f"{split}_mask"]),
                batch_size=args.batch_size,
                shuffle=split == "train",
                seed=args.seed,
            )
            for split in ("train", "val", "test")
        }
        torch.manual_seed(args.seed)
        metadata = (share.node_types, share.edge_types)
        sizes = {
            t: (int(share.offsets(t)[-1]), share.node(t)["x"].size(1) if "x" in share.node(t) else 0)
            for t in share.node_types
        }
        largest = int(owned["y"].max()) if share.num_owned(args.target) else 0
        num_classes = int(training.all_numbers([largest], worker.group).max()) + 1
        layers = [MODELS[args.model](metadata, args.hidden) for _ in args.fanouts]
        inner = Typed(sizes, layers, args.target, args.hidden, num_classes)
        # Types that no author reaches get no gradient.
        model = DistributedDataParallel(inner, find_unused_parameters=True) if worker.world_size > 1 else inner
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=5e-4)

        def loss_of(batch: Any) -> tuple[Tensor, int]:
            seeds = batch[args.target]
            return F.cross_entropy(model(batch), seeds.y[: seeds.batch_size]), seeds.batch_size

        def accuracy(split: str) -> float:
            right = count = 0
            for batch in loaders[split]:
                labels = batch[args.target].y[: batch[args.target].batch_size]
                right, count = right + int((inner(batch).argmax(1) == labels).sum()), count + labels.numel()
            right_all, count_all = training.all_numbers([right, count], worker.group).sum(0).tolist()
            return right_all / max(count_all, 1)

        def evaluate() -> dict[str, float]:
            return {split: accuracy(split) for split in ("val", "test")}

        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        with training.open_checkpoints(args, {"model": model, "optimizer": optimizer, **loaders}, worker.group) as checkpoints:
            history = training.fit_batches(
                model, optimizer, loaders["train"], loss_of, evaluate, args.epochs, worker.group, log.write, worker.is_first, checkpoints
            )
        for loader in loaders.values():
            loader.close()
        if worker.is_first:
            title = f"{args.model} on {args.npz.stem}, {worker.world_size} worker(s)"
            Console().print(training.batch_summary_table(history, title=title))


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--npz", type=Path, required=True, help="a graph file with types, see partpar.datasets.from_npz")
    parser.add_argument("--target", default="author", help="the node type that has y and masks")
    parser.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<file>)")
    parser.add_argument("--model", choices=MODELS, default="sage", help="architecture")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[15, 10], help="neighbours to draw in each hop")
    parser.add_argument("--batch-size", type=int, default=128, help="seeds of a batch, on each worker")
    parser.add_argument("--hidden", type=int, default=64, help="hidden channels")
    parser.add_argument("--epochs", type=int, default=10, help="how many")
    parser.add_argument("--lr", type=float, default=0.005, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0, help="of the partition, samples and weights")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another worker")
    parser.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    return parser.parse_args()


def root(args: argparse.Namespace) -> Path:
    r"""The folder of this graph's partitions."""
    return args.root or Path("partitions") / args.npz.stem


def partition(args: argparse.Namespace, num_parts: int) -> str:
    r"""Reads the graph, gives each edge type one that leads back, and cuts it, unless it was cut so before."""
    data = datasets.from_npz(args.npz)
    assert isinstance(data, HeteroData)
    graph = GraphData.from_pyg_data(T.ToUndirected()(data))
    return str(graph.partition_graph(root(args), num_parts, partition_kwargs={"seed": args.seed}))


if __name__ == "__main__":
    main()
