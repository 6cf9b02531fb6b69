r"""Trains a classifier of nodes on a whole graph, by any number of workers, with the numbers of one process.

.. code-block:: console

    python examples/train_full_graph.py
    torchrun --standalone --nproc-per-node 2 examples/train_full_graph.py
    torchrun --standalone --nproc-per-node 4 examples/train_full_graph.py --npz cora.npz --normalize
    --patience 50

The first run with so many workers cuts the graph and writes a share for each; later runs open the shares.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from partpar.models import GAT, GCN, GIN, GraphSAGE, SimpleNet
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, Route, datasets, training

MODELS = {"gcn": GCN, "sage": GraphSAGE, "gat": GAT, "gin": GIN, "simple": SimpleNet}


def main() -> None:
    r"""Sets up, partitions if need be, trains, and prints what came out."""
    args = parse()
    # The environment of torchrun makes this process one of several workers; without it, it works alone.
    with training.init(device=args.device, timeout=args.timeout) as worker:
        # 1. Rank 0 cuts the graph, unless a fitting partition stands already. If it fails, all ranks fail.
        training.first_rank(lambda: partition(args, worker.world_size), worker.group)
        training.forget_peak_memory()  # of the cut: the table at the end is to tell what training needs

        # 2. Each worker opens its share: the nodes it owns, their in-edges, and which nodes of others these
        # come from.
        share = GraphData.load_partition(root(args), worker.rank, worker.world_size, args.algorithm).to(
            worker.device
        )
        prepare(share, args)

        # 3. The route carries rows between the workers.
        route = share.to_route(worker.group).with_policy(wire_dtype=args.wire)

        # 4. An ordinary model, whose layers take the route. DistributedDataParallel adds the gradients up.
        torch.manual_seed(args.seed)
        model = make_model(args, share, route).to(worker.device, args.dtype)
        if worker.world_size > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)

        # 5. Every epoch is a step on the whole graph; see partpar/training/full_graph.py for the loop.
        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        with training.open_checkpoints(args, {"model": model, "optimizer": optimizer}, worker.group) as checkpoints:
            history = training.fit(
                model,
                optimizer,
                share,
                route,
                epochs=args.epochs,
                patience=args.patience,
                metric=args.metric,
                on_epoch=log.write,
                progress=worker.is_first,
                checkpoints=checkpoints,
            )
        log.write(**history.record)  # figures of every rank, for partpar report
        if worker.is_first:
            title = f"{args.model} on {args.npz or args.pt or args.dataset}, {worker.world_size} worker(s)"
            Console().print(training.summary_table(history, args.metric, title))


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="example: torchrun --standalone --nproc-per-node 2 examples/train_full_graph.py --model sage",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("graph")
    data.add_argument(
        "--dataset", default="planted", help="planted, karate, Cora, CiteSeer, PubMed or ogbn-..."
    )
    data.add_argument("--npz", type=Path, help="a graph file to read instead, see partpar.datasets.from_npz")
    data.add_argument("--pt", type=Path, help="a PyG graph written by torch.save, to read instead")
    data.add_argument("--nodes", type=int, default=4000, help="nodes of the planted graph")
    data.add_argument("--split", type=int, default=0, help="which split of a file that has several")
    data.add_argument("--normalize", action="store_true", help="divide each row of features by its sum")
    cut = parser.add_argument_group("partition")
    cut.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<graph>)")
    cut.add_argument("--algorithm", default="metis", help="metis, multi-constraint-metis, ldg or random")
    cut.add_argument(
        "--node-weight", nargs="*", help="node attributes, #nodes, #in_edges to balance (default: #nodes)"
    )
    cut.add_argument(
        "--overwrite", action="store_true", help="replace a partition of another graph or other options"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="gcn", help="architecture")
    model.add_argument("--hidden", type=int, default=64, help="hidden channels")
    model.add_argument("--layers", type=int, default=2, help="number of layers")
    model.add_argument("--heads", type=int, default=4, help="attention heads of gat")
    model.add_argument(
        "--norm", choices=["batch_norm", "layer_norm"], help="norm between layers, not for simple"
    )
    model.add_argument("--dropout", type=float, default=0.5, help="of hidden rows, not for simple")
    model.add_argument(
        "--recompute", action="store_true", help="run layers again backwards: less memory; not for simple"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=100, help="at most")
    train.add_argument(
        "--patience", type=int, help="stop after so many epochs without a better validation metric"
    )
    train.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam")
    train.add_argument("--weight-decay", type=float, default=5e-4, help="of Adam")
    train.add_argument(
        "--metric", choices=["accuracy", "auc"], default="accuracy", help="auc is for two classes"
    )
    train.add_argument("--seed", type=int, default=0, help="of the graph, the partition, weights and dropout")
    train.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32", help="of features and weights"
    )
    train.add_argument(
        "--wire", choices=["bfloat16", "float16"], help="round rows to this on their way between workers"
    )
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for another worker")
    train.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    train.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    args.wire = getattr(torch, args.wire) if args.wire else None
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
        options = {"num_nodes": args.nodes} if args.dataset == "planted" else {}
        seeded = args.dataset in datasets.GENERATED
        data = datasets.load(args.dataset, **options, **({"seed": args.seed} if seeded else {}))
    graph = GraphData.from_pyg_data(data)
    folder = graph.partition_graph(
        root(args),
        num_parts,
        node_weight=args.node_weight,
        algorithm=args.algorithm,
        partition_kwargs={"seed": args.seed},
        overwrite=args.overwrite,
    )
    return str(folder)


def prepare(share: GraphData, args: argparse.Namespace) -> None:
    r"""Casts and, if asked, normalises the features: row by row, so that no worker needs another's."""
    owned = share.node("dst")
    x = owned["x"].to(args.dtype)
    owned["x"] = x / x.sum(dim=1, keepdim=True).clamp(min=1) if args.normalize else x


def make_model(args: argparse.Namespace, share: GraphData, route: Route) -> torch.nn.Module:
    r"""The model; its sizes are those of the whole graph, so every worker makes the same."""
    owned = share.node("dst")
    largest = int(owned["y"].max()) if share.num_owned() else 0
    num_classes = int(training.all_numbers([largest], route.group).max()) + 1
    sizes = (owned["x"].size(1), args.hidden, args.layers, num_classes)
    if args.model == "simple":
        return SimpleNet(*sizes)
    options: dict[str, Any] = {"heads": args.heads} if args.model == "gat" else {}
    options.update(dropout=args.dropout, norm=args.norm, seed=args.seed, recompute=args.recompute)
    return MODELS[args.model](*sizes, **options)


if __name__ == "__main__":
    main()
