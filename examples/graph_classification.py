r"""Classifies whole graphs by a graph isomorphism network, over ten folds, by any number of workers.

.. code-block:: console

    python examples/graph_classification.py --npz mutag.npz
    torchrun --standalone --nproc-per-node 2 examples/graph_classification.py --npz mutag.npz

The protocol is that of Xu et al., "How Powerful are Graph Neural Networks?" (ICLR 2019): ten stratified folds, the same
number of epochs for all, and of the epochs that whose accuracy on the held-out folds is best in the mean. Nodes are known
by their labels alone and entries are dropped after the readout, as in the paper; ``--use_node_attr`` adds the attributes
of the file as they are. Each batch is dealt to the workers by whole graphs; norms, sums and losses are those of the batch,
so the numbers do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from partpar.models import DistributedGIN, DistributedGINE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from partpar import training
from partpar.graph.collection import GraphCollection
from partpar.nn import Dropout
from partpar.nn.graph_batch import GraphBatch
from partpar.sharded import SparseAdam

MODELS = {"gin": DistributedGIN, "gine": DistributedGINE}


class GraphClassifier(torch.nn.Module):
    r"""Sums the rows of each graph's nodes and classifies the sums, of which entries are dropped in training. Sums are the
    same on every worker, and so is what is dropped."""

    def __init__(self, gnn: DistributedGIN, num_classes: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.gnn = gnn
        self.dropout = Dropout(dropout, seed, layer=0)
        self.lin = torch.nn.Linear(gnn.out_channels, num_classes)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        r"""``[batch_size, num_classes]``, of what the network takes."""
        return self.lin(self.dropout(self.gnn(*args, **kwargs)))


def main() -> None:
    r"""Trains on nine folds and measures on the tenth, ten times, for each seed."""
    args = parse()
    with training.init(timeout=args.timeout) as worker:
        graphs = GraphCollection.from_npz(args.npz)
        log, scalars = training.JsonLines(args.metrics, worker.rank), training.Scalars(args.logdir, worker.rank)
        table = Table("seed", "accuracy", "deviation over folds", "epoch", "seconds")
        means = []
        for seed in args.seeds:
            start = time.perf_counter()
            with training.open_checkpoints(args, {}, worker.group, f"seed_{seed}") as checkpoints:
                curves = (checkpoints.resume() or {"curves": []})["curves"]
                bar = tqdm(folds(graphs.y, args.folds, seed), desc=f"seed {seed}", total=args.folds, unit="fold",
                           disable=None if worker.is_first else True, leave=False)  # fmt: skip
                for number, (train, test) in enumerate(bar):
                    if number < checkpoints.step:  # an earlier run was through with it
                        continue
                    curves.append(run_fold(args, worker, graphs, train, test, seed))
                    log.write(seed=seed, fold=number, accuracy=curves[-1])
                    checkpoints.save(number + 1, force=number + 1 == args.folds, curves=curves)
            by_epoch = torch.tensor(curves).mean(0)
            for epoch, value in enumerate(by_epoch.tolist(), 1):
                scalars.write(epoch, **{f"seed {seed}/accuracy": value})
            best = int(by_epoch.argmax())
            means.append(float(by_epoch[best]))
            spread = float(torch.tensor(curves)[:, best].std(correction=0))
            took = time.perf_counter() - start
            table.add_row(str(seed), f"{means[-1]:.4f}", f"{spread:.4f}", str(best + 1), f"{took:.0f}")
        mean = torch.tensor(means).mean().item()
        table.add_row("mean", f"{mean:.4f}", "", "", "")
        log.write(mean=mean)
        if worker.is_first:
            table.title = f"{args.model} on {args.npz.name}, {args.folds} folds, {worker.world_size} worker(s)"
            Console().print(table)


def run_fold(
    args: argparse.Namespace, worker: training.Context, graphs: GraphCollection, train: Tensor, test: Tensor, seed: int
) -> list[float]:
    r"""Accuracy on the held-out graphs after each epoch."""
    torch.manual_seed(seed)
    model = make_model(args, graphs).to(args.dtype)
    sparse = None
    if args.use_dist_embedding:
        model.gnn.set_num_embeddings(int(graphs.node_label.max()) + 1)
        sparse = SparseAdam(model.gnn.embeddings, lr=args.lr, scale_grad=1 / worker.world_size)
    parallel = DistributedDataParallel(model) if worker.world_size > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5)
    draw = torch.Generator().manual_seed(seed)

    def outputs(module: torch.nn.Module, batch: GraphBatch) -> Tensor:
        node_ids = graphs.node_label[batch.nodes] if args.use_dist_embedding else None
        attr = one_hot(args, graphs.edge_label, batch.edges) if args.model == "gine" else None
        return module(
            inputs(args, graphs, batch.nodes), batch.edge_index, attr, batch.batch, node_ids, route=batch.route,
            batch_size=len(batch.y),
        )  # fmt: skip

    accuracies, held_out = [], GraphBatch.deal(graphs, test, worker.group)
    for _ in range(args.epochs):
        model.train()
        for chosen in train[torch.randperm(len(train), generator=draw)].split(args.batch_size):
            batch = GraphBatch.deal(graphs, chosen, worker.group)
            optimizer.zero_grad()
            # Every worker has the outputs of all graphs of the batch, and so the loss of the batch.
            F.cross_entropy(outputs(parallel, batch), batch.y).backward()
            optimizer.step()
            if sparse is not None:
                sparse.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            found = outputs(model, held_out).argmax(1)
        accuracies.append(float((found == held_out.y).double().mean()))
    return accuracies


def folds(y: Tensor, num_folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Graphs to train on and graphs to measure on; every fold has each class in proportion."""
    draw = torch.Generator().manual_seed(seed)
    fold = torch.empty_like(y)
    dealt = 0
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=draw)]
        fold[members] = (torch.arange(len(members)) + dealt) % num_folds
        dealt += len(members)
    for number in range(num_folds):
        yield (fold != number).nonzero().flatten(), (fold == number).nonzero().flatten()


def num_labels(labels: Tensor | None) -> int:
    r"""How many labels there are; none without any."""
    return 0 if labels is None else int(labels.max()) + 1


def one_hot(args: argparse.Namespace, labels: Tensor | None, places: Tensor) -> Tensor:
    r"""Labels as columns; one column of ones where there are none."""
    if labels is None:
        return torch.ones(len(places), 1, dtype=args.dtype)
    return F.one_hot(labels[places], num_labels(labels)).to(args.dtype)


def inputs(args: argparse.Namespace, graphs: GraphCollection, nodes: Tensor) -> Tensor | None:
    r"""What is known of nodes; nothing where their rows are learned from their labels."""
    if args.use_dist_embedding:
        return None
    x = one_hot(args, graphs.node_label, nodes)
    if not args.use_node_attr or graphs.node_attr is None:
        return x
    return torch.cat([x, graphs.node_attr[nodes].to(args.dtype)], 1)


def make_model(args: argparse.Namespace, graphs: GraphCollection) -> GraphClassifier:
    r"""Layers whose outputs are all read for the result, as in the paper."""
    known = inputs(args, graphs, torch.arange(1))
    in_channels = args.embedding_dim if known is None else known.size(1)
    options = {"edge_dim": max(num_labels(graphs.edge_label), 1)} if args.model == "gine" else {}
    gnn = MODELS[args.model](
        in_channels, args.hidden_channels, args.hidden_channels, args.num_layers, norm="batch_norm", jk="cat",
        use_dist_embedding=args.use_dist_embedding, use_dist_tensor=args.use_dist_tensor, **options,
    )  # fmt: skip
    return GraphClassifier(gnn, int(graphs.y.max()) + 1, args.dropout, args.seeds[0])


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: torchrun --standalone --nproc-per-node 2 examples/graph_classification.py --npz mutag.npz",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--npz", type=Path, required=True, help="a file of graphs, see partpar.graph.collection.GraphCollection"
    )
    parser.add_argument("--folds", type=int, default=10, help="how many, of which each is held out once")
    parser.add_argument("--model", choices=MODELS, default="gin", help="gine reads edge labels too")
    parser.add_argument("--hidden_channels", type=int, default=32, help="size of hidden rows")
    parser.add_argument("--num_layers", type=int, default=3, help="number of layers")
    parser.add_argument("--dropout", type=float, default=0.5, help="of the rows of graphs, after the readout")
    parser.add_argument(
        "--use_node_attr", action="store_true", help="read node attributes, unscaled, beside node labels"
    )
    parser.add_argument("--use_dist_embedding", action="store_true", help="learn a row for each node label")
    parser.add_argument("--embedding_dim", type=int, default=16, help="columns of such a row")
    parser.add_argument("--use_dist_tensor", action="store_true", help="measure through sharded tensors")
    parser.add_argument("--epochs", type=int, default=60, help="for every fold")
    parser.add_argument("--batch_size", type=int, default=32, help="graphs of all workers in a step")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam, halved every 50 epochs")
    parser.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32",
        help="of rows and weights; in float64 any number of workers ends with the same accuracy",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of folds, weights and order")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another worker")
    parser.add_argument("--metrics", type=Path, help="file to append a JSON line to for each fold")
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser, "folds")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


if __name__ == "__main__":
    main()
