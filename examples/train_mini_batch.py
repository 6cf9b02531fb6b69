r"""Trains GraphSAGE on sampled neighbourhoods, by any number of workers; validates and tests on the whole graph.

.. code-block:: console

    python examples/train_mini_batch.py
    torchrun --standalone --nproc-per-node 2 examples/train_mini_batch.py
    torchrun --standalone --nproc-per-node 2 examples/train_mini_batch.py --npz tolokers.npz --metric auc

The partition is that of examples/train_full_graph.py: the first run with so many workers cuts the graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from partpar.models import GraphSAGE
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, datasets, training
from partpar.sampling import DistNeighborLoader, blocks


def main() -> None:
    r"""Sets up, partitions if need be, trains, and prints what came out."""
    args = parse()
    with training.init(timeout=args.timeout) as worker:
        # 1. Rank 0 cuts the graph, unless a fitting partition stands already.
        training.first_rank(lambda: partition(args, worker.world_size), worker.group)
        training.forget_peak_memory()

        # 2. Each worker opens its share; the loader finds what its seeds need in all of them.
        share = GraphData.load_partition(root(args), worker.rank, worker.world_size)
        owned, route = share.node(), share.to_route(worker.group)
        owned["x"] = owned["x"].to(args.dtype)
        loader = DistNeighborLoader(
            share,
            args.fanouts,
            owned["train_mask"],
            batch_size=args.batch_size,
            shuffle=True,
            concurrency=args.concurrency,
            num_workers=args.num_workers,
            seed=args.seed,
            attributes=["x", "y"],
        )

        # 3. An ordinary model; each of its layers gets the edges that it needs.
        torch.manual_seed(args.seed)
        largest = int(owned["y"].max()) if share.num_owned() else 0
        num_classes = int(training.all_numbers([largest], worker.group).max()) + 1
        inner = GraphSAGE(owned["x"].size(1), args.hidden, len(args.fanouts), num_classes, dropout=args.dropout).to(args.dtype)
        model = DistributedDataParallel(inner) if worker.world_size > 1 else inner
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)

        def loss_of(batch: Any) -> tuple[Tensor, int]:
            out = model(batch.x, blocks(batch))
            return F.cross_entropy(out, batch.y[: batch.batch_size], ignore_index=-1), batch.batch_size

        def evaluate() -> dict[str, float]:
            logits = training.full_graph_inference(inner, share, route, gather=False)
            rows = owned["raw_ids"].argsort().argsort()  # predictions stand by raw id
            return {
                split: training.measure(args.metric, logits[rows], owned["y"], owned[f"{split}_mask"], route)
                for split in ("train", "val", "test")
            }

        # 4. Train on samples, measure exactly.
        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        with training.open_checkpoints(args, {"model": model, "optimizer": optimizer, "loader": loader}, worker.group) as checkpoints:
            history = training.fit_batches(
                model, optimizer, loader, loss_of, evaluate, args.epochs, worker.group, log.write, worker.is_first, checkpoints
            )
        loader.close()
        if worker.is_first:
            title = f"GraphSAGE on {args.npz or args.pt or args.dataset}, {worker.world_size} worker(s)"
            Console().print(training.batch_summary_table(history, args.metric, title))


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="planted", help="planted, karate, Cora, CiteSeer, PubMed or ogbn-...")
    parser.add_argument("--npz", type=Path, help="a graph file to read instead, see partpar.datasets.from_npz")
    parser.add_argument("--pt", type=Path, help="a PyG graph written by torch.save, to read instead")
    parser.add_argument("--nodes", type=int, default=4000, help="nodes of the planted graph")
    parser.add_argument("--split", type=int, default=0, help="which split of a file that has several")
    parser.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<graph>)")
    parser.add_argument("--overwrite", action="store_true", help="replace a partition of another graph or other options")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10, 5], help="neighbours to draw in each hop")
    parser.add_argument("--batch-size", type=int, default=256, help="seeds of a batch, on each worker")
    parser.add_argument("--hidden", type=int, default=64, help="hidden channels")
    parser.add_argument("--dropout", type=float, default=0.2, help="of hidden rows")
    parser.add_argument("--epochs", type=int, default=10, help="how many")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam")
    parser.add_argument("--metric", choices=["accuracy", "auc"], default="accuracy", help="auc is for two classes")
    parser.add_argument("--seed", type=int, default=0, help="of the graph, the partition, samples, weights and dropout")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of features and weights")
    parser.add_argument("--concurrency", type=int, default=1, help="threads that make batches")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that make batches instead")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another worker")
    parser.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


def root(args: argparse.Namespace) -> Path:
    r"""The folder of this graph's partitions."""
    file = args.npz or args.pt
    return args.root or Path("partitions") / (file.stem if file else args.dataset)


def partition(args: argparse.Namespace, num_parts: int) -> str:
    r"""Cuts the graph, unless this very graph was cut so before."""
    if args.npz is not None:
        data = datasets.from_npz(args.npz, args.split)
    elif args.pt is not None:
        data = datasets.from_pt(args.pt)
    else:
        sized = {"num_nodes": args.nodes} if args.dataset == "planted" else {}
        seeded = {"seed": args.seed} if args.dataset in datasets.GENERATED else {}
        data = datasets.load(args.dataset, **sized, **seeded)
    graph = GraphData.from_pyg_data(data)
    options = {"seed": args.seed}
    return str(graph.partition_graph(root(args), num_parts, partition_kwargs=options, overwrite=args.overwrite))


if __name__ == "__main__":
    main()
