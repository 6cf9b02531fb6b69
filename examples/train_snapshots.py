r"""Trains a recurrent graph network over the snapshots of a temporal graph to predict the next snapshot's edges, on the
full graph, by any number of workers, with the numbers of one process.

.. code-block:: console

    python examples/train_snapshots.py
    torchrun --standalone --nproc-per-node 2 examples/train_snapshots.py --npz bitcoin_otc.npz --snapshots 10

One partition of the nodes cuts all snapshots: a node's hidden state stays with its owner over time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from partpar.models import RecurrentGCN
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, datasets, training
from partpar.graph import Snapshot
from partpar.kernels import counter
from partpar.nn import fetch_ahead, global_mean
from partpar.training.metrics import roc_auc
from partpar.training.pairs import Pairs, make_pairs


def main() -> None:
    r"""Sets up, partitions if need be, trains, and prints a line for each epoch."""
    args = parse()
    with training.init() as worker:
        training.first_rank(lambda: partition(args, worker.world_size), worker.group)
        share = GraphData.load_partition(args.root, worker.rank, worker.world_size)
        # 1. Each window of time has its own edges, halo and route; the owned nodes are the same in all.
        snapshots = share.snapshots(worker.group)
        group = snapshots[0].route.group
        num_nodes = int(share.offsets()[-1])
        features = [describe(snapshot, args) for snapshot in snapshots]
        pairs = [make_pairs(s, num_nodes, args.seed, group, args.dtype) for s in snapshots]

        torch.manual_seed(args.seed)
        sequence = Sequence(RecurrentGCN(args.features, args.hidden).to(args.dtype), snapshots, features, pairs)
        model = DistributedDataParallel(sequence) if worker.world_size > 1 else sequence
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        last = len(snapshots) - 2  # the last two windows: the state after one predicts the edges of the other
        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        with training.open_checkpoints(args, {"model": model, "optimizer": optimizer}, worker.group) as checkpoints:
            checkpoints.resume()
            for epoch in range(checkpoints.step + 1, args.epochs + 1):
                optimizer.zero_grad()
                loss, _ = model(range(last))
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    _, (logits, label) = sequence(range(last + 1))
                everything = torch.ones_like(label, dtype=torch.bool)
                auc = roc_auc(logits, label.long(), everything, snapshots[0].route)
                record = {"epoch": epoch, "loss": loss.item(), "auc": auc}
                log.write(**record)
                if worker.is_first:
                    print(json.dumps(record), flush=True)
                checkpoints.save(epoch, force=epoch == args.epochs)


class Sequence(torch.nn.Module):
    r"""The loss over a stretch of time: the state after each snapshot is to tell the edges of the next."""

    def __init__(
        self, model: RecurrentGCN, snapshots: list[Snapshot], features: list[Tensor], pairs: list[Pairs]
    ) -> None:
        super().__init__()
        self.model, self.snapshots, self.features, self.pairs = model, snapshots, features, pairs

    def forward(self, windows: range) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Returns the mean loss, and logits and labels of the last window's pairs (collective)."""
        state, losses = None, []
        stretch = [self.snapshots[i] for i in windows]
        # 2. The features of the next snapshot travel while this one is worked on.
        for snapshot, x in fetch_ahead(stretch, lambda s: self.features[s.index]):
            state = self.model(x, snapshot.share.adj(), state, snapshot.route)
            # 3. Pairs may join any two nodes: a route of their own brings the states of their sources.
            pairs = self.pairs[snapshot.index + 1]
            logits = self.model.score(pairs.route.apply(state), state[pairs.destination])
            rows = F.binary_cross_entropy_with_logits(logits, pairs.label, reduction="none")
            losses.append(global_mean(rows, route=snapshot.route))
        return torch.stack(losses).mean(), (logits, pairs.label)


def describe(snapshot: Snapshot, args: argparse.Namespace) -> Tensor:
    r"""Features of the owned nodes: how many edges of the window enter and leave them, and numbers that tell nodes apart,
    drawn by raw id. Leaving edges are with their destinations' owners, so their counts are summed over the workers."""
    share = snapshot.share
    sources, _ = share.edge_index()
    leaving = torch.bincount(sources, minlength=snapshot.route.num_src).to(args.dtype)
    degrees = torch.stack([share.adj().degrees.to(args.dtype), snapshot.route.reduce(leaving)], 1).log1p()
    names = counter.uniform(args.seed, 0, 1, share.node("dst")["raw_ids"], args.features - 2, args.dtype)
    return torch.cat([degrees, names - 0.5], 1)


def partition(args: argparse.Namespace, num_parts: int) -> str:
    r"""Cuts the graph, unless this very graph was cut so before."""
    if args.npz is not None:
        data = datasets.from_npz(args.npz)
    else:
        data = datasets.planted(args.nodes, seed=args.seed)
        draw = torch.Generator().manual_seed(args.seed)
        data.t = torch.rand(data.edge_index.size(1), generator=draw)
    graph = GraphData.from_pyg_data(data)
    windows = {"time_attr": "t", "num_snapshots": args.snapshots}
    return str(graph.partition_graph(args.root, num_parts, **windows, overwrite=args.overwrite))


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--npz", type=Path, help="a temporal graph: src, dst and t (default: a generated one)")
    parser.add_argument("--nodes", type=int, default=1000, help="nodes of the generated graph")
    parser.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<graph>)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a partition of another graph or other windows"
    )
    parser.add_argument("--snapshots", type=int, default=8, help="windows of equal length")
    parser.add_argument("--features", type=int, default=16, help="columns of a node's features, at least 3")
    parser.add_argument("--hidden", type=int, default=32, help="size of a node's state")
    parser.add_argument("--epochs", type=int, default=20, help="steps, each over all snapshots")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0, help="of weights, features and pairs")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of all rows")
    parser.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    args.root = args.root or Path("partitions") / (args.npz.stem if args.npz else "planted_temporal")
    return args


if __name__ == "__main__":
    main()
