r"""Classifies the nodes of a graph that has no features, from rows that are learned with the model.

.. code-block:: console

    python examples/node_embedding.py --npz pubmed_nofeat.npz
    torchrun --standalone --nproc-per-node 2 examples/node_embedding.py --npz ogbn_arxiv_nofeat.npz --undirected

A node's learned row lives with its owner (:class:`partpar.sharded.DistEmbedding`) and is trained by a sparse optimiser,
next to Adam for the weights of the model. Every epoch is one step on the whole graph; with ``--batch_size``, a step for
each batch of sampled neighbourhoods, which updates the rows in the batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from partpar.models import DistributedGIN
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.utils import to_undirected
from tqdm import tqdm

from partpar import GraphData, Route, datasets, training
from partpar.nn import global_mean
from partpar.sampling import DistNeighborLoader, blocks
from partpar.sharded import Normal, SparseAdagrad, SparseAdam, SparseOptimizer, SparseSGD

OPTIMISERS = {"adam": SparseAdam, "adagrad": SparseAdagrad, "sgd": SparseSGD}
SPLITS = ("train", "val", "test")


def main() -> None:
    r"""Cuts the graph if need be, trains once for each seed, and prints what came out."""
    args = parse()
    with training.init(timeout=args.timeout) as worker:
        root = args.root or Path("partitions") / f"{args.npz.stem}{'_undirected' if args.undirected else ''}"
        training.first_rank(lambda: partition(args, root, worker.world_size), worker.group)
        share = GraphData.load_partition(root, worker.rank, worker.world_size, args.algorithm)
        route = share.to_route(worker.group)
        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        table = Table("seed", *SPLITS, "best epoch", "seconds per epoch")
        tests = []
        for seed in args.seeds:
            best, seconds = train(args, worker, share, route, seed, log)
            tests.append(best["test"])
            table.add_row(
                str(seed), *(f"{best[split]:.4f}" for split in SPLITS), str(int(best["epoch"])), f"{seconds:.3f}"
            )
        mean = torch.tensor(tests).mean().item()
        table.add_row("mean", "", "", f"{mean:.4f}", "", "")
        log.write(mean=mean)
        if worker.is_first:
            table.title = f"{args.npz.name}, learned rows of {args.embedding_dim}, {worker.world_size} worker(s)"
            Console().print(table)


def train(
    args: argparse.Namespace,
    worker: training.Context,
    share: GraphData,
    route: Route,
    seed: int,
    log: training.RunLog,
) -> tuple[dict[str, float], float]:
    r"""Accuracies at the epoch that is best on the validation nodes, and seconds of an epoch."""
    nodes = share.node("dst")
    torch.manual_seed(seed)
    largest = int(nodes["y"].max()) if share.num_owned() else 0
    num_classes = int(training.all_numbers([largest], worker.group).max()) + 1
    model = DistributedGIN(
        args.embedding_dim if args.use_dist_embedding else 1, args.hidden_channels, num_classes, args.num_layers,
        norm="batch_norm", dropout=args.dropout, seed=seed, use_dist_embedding=args.use_dist_embedding,
        use_dist_tensor=args.use_dist_tensor,
    ).to(args.dtype)  # fmt: skip
    x, sparse = None, None
    if args.use_dist_embedding:
        num_nodes, first = int(share.offsets()[-1]), Normal(std=args.std, seed=seed)
        if args.batch_size:  # batches name nodes by raw id: rows are split evenly by that
            model.set_num_embeddings(num_nodes, init_func=first)
        else:  # rows live with their nodes; first values go by raw id, to be the same for any cut
            model.set_num_embeddings(num_nodes, part_policy=share, init_func=first.of(nodes["raw_ids"]))
        sparse = make_optimiser(args, model, worker.world_size)
    else:
        x = share.adj().degrees.to(args.dtype).log1p().unsqueeze(1)
    parallel = DistributedDataParallel(model) if worker.world_size > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    def outputs(module: torch.nn.Module) -> Tensor:
        ids = nodes["raw_ids"] if args.batch_size else nodes["ids"]
        return module(x, share.adj(), node_ids=ids, route=route)

    def step(loss: Tensor) -> float:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if sparse is not None:
            sparse.step()
        return loss.item()

    def whole_graph() -> float:
        losses = F.cross_entropy(outputs(parallel), nodes["y"], reduction="none")
        return step(global_mean(losses, nodes["train_mask"], route))

    run_epoch: Callable[[], float] = whole_graph
    state = {"model": model, "optimizer": optimizer, **({} if sparse is None else {"sparse": sparse})}
    if args.batch_size:
        loader = DistNeighborLoader(
            share, [args.fanout] * args.num_layers, nodes["train_mask"], batch_size=args.batch_size, shuffle=True,
            seed=seed, attributes=["y"],
        )  # fmt: skip
        run_epoch = partial(sampled, loader, parallel, step)
        state["loader"] = loader

    best: dict[str, float] = {"val": -1.0}
    seconds: list[float] = []
    with training.open_checkpoints(args, state, worker.group, f"seed_{seed}") as checkpoints:
        best = (checkpoints.resume() or {"best": best})["best"]
        epochs = range(checkpoints.step + 1, args.epochs + 1)
        shown = None if worker.is_first else True  # in terminals only
        for epoch in tqdm(epochs, desc=f"seed {seed}", unit="epoch", disable=shown, leave=False):
            start = time.perf_counter()
            model.train()
            loss = run_epoch()
            seconds.append(time.perf_counter() - start)
            model.eval()
            with torch.no_grad():
                logits = outputs(model)
            scores = {
                split: training.measure("accuracy", logits, nodes["y"], nodes[f"{split}_mask"], route) for split in SPLITS
            }
            log.write(seed=seed, epoch=epoch, loss=loss, **scores)
            if scores["val"] > best["val"]:
                best = {"epoch": float(epoch), **scores}
            checkpoints.save(epoch, force=epoch == args.epochs, best=best)
    if args.batch_size:
        loader.close()
    return best, statistics.median(seconds or [0.0])


def sampled(loader: DistNeighborLoader, model: torch.nn.Module, step: Callable[[Tensor], float]) -> float:
    r"""A step for each batch of sampled neighbourhoods; every worker makes as many. The mean of this worker's losses."""

    def loss_of(batch: Any) -> Tensor:
        out = model(None, blocks(batch), node_ids=batch.n_id)
        return F.cross_entropy(out, batch.y[: batch.batch_size])

    return torch.tensor([step(loss_of(batch)) for batch in loader]).mean().item()


def make_optimiser(args: argparse.Namespace, model: DistributedGIN, world_size: int) -> SparseOptimizer:
    r"""Of the learned rows. :class:`~torch.nn.parallel.DistributedDataParallel` averages the gradients of weights over
    workers; those of rows are summed, hence the scale."""
    lr = args.lr if args.embedding_lr is None else args.embedding_lr
    return OPTIMISERS[args.optimiser](model.embeddings, lr=lr, scale_grad=1 / world_size)


def partition(args: argparse.Namespace, root: Path, num_parts: int) -> str:
    r"""Cuts the graph, unless this very graph was cut so before."""
    data = datasets.from_npz(args.npz)
    if args.undirected:
        data.edge_index = to_undirected(data.edge_index, num_nodes=data.num_nodes)
    graph = GraphData.from_pyg_data(data)
    return str(graph.partition_graph(root, num_parts, algorithm=args.algorithm, overwrite=args.overwrite))


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: torchrun --standalone --nproc-per-node 2 examples/node_embedding.py --npz pubmed_nofeat.npz",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("graph")
    data.add_argument("--npz", type=Path, required=True, help="a graph file, see partpar.datasets.from_npz")
    data.add_argument("--undirected", action="store_true", help="add the reverse of each edge")
    data.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<graph>)")
    data.add_argument("--algorithm", default="metis", help="metis, multi-constraint-metis, ldg or random")
    data.add_argument("--overwrite", action="store_true", help="replace a partition of another graph")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--use_dist_embedding", action=argparse.BooleanOptionalAction, default=True,
        help="learn a row for each node; otherwise its degree is all that is known",
    )  # fmt: skip
    model.add_argument("--embedding_dim", type=int, default=64, help="columns of a learned row")
    model.add_argument("--std", type=float, default=0.1, help="standard deviation of first values")
    model.add_argument("--use_dist_tensor", action="store_true", help="evaluate through sharded tensors, in chunks")
    model.add_argument("--hidden_channels", type=int, default=64, help="size of hidden rows")
    model.add_argument("--num_layers", type=int, default=2, help="number of layers")
    model.add_argument("--dropout", type=float, default=0.5, help="of hidden rows")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=50, help="how many")
    train.add_argument(
        "--batch_size", type=int, default=0, help="seeds of a batch on each worker; 0 trains on the whole graph"
    )
    train.add_argument("--fanout", type=int, default=10, help="neighbours to draw in each hop of a batch")
    train.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam")
    train.add_argument("--optimiser", choices=OPTIMISERS, default="adam", help="of the learned rows")
    train.add_argument("--embedding_lr", type=float, help="its learning rate (default: --lr)")
    train.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32",
        help="of rows and weights; in float64 any number of workers ends with the same accuracy",
    )  # fmt: skip
    train.add_argument("--seeds", type=int, nargs="+", default=[0], help="of first values, weights and dropout")
    train.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another worker")
    train.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    train.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    args = parser.parse_args()
    if args.batch_size and not args.use_dist_embedding:
        parser.error("--batch_size trains learned rows: leave --no-use_dist_embedding out")
    args.dtype = getattr(torch, args.dtype)
    return args


if __name__ == "__main__":
    main()
