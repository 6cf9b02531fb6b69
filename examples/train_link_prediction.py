r"""Predicts links from sampled neighbourhoods, by any number of workers: of a temporal network, from its past alone.

.. code-block:: console

    python examples/train_link_prediction.py --npz collegemsg.npz
    torchrun --standalone --nproc-per-node 2 examples/train_link_prediction.py --npz collegemsg.npz

Links are split by time: the last tenth tests, the tenth before validates. No neighbour is drawn over an edge that is later
than the link that it is drawn for. Nodes have no features but what they learn, so gradients of rows of a table travel with
those of the weights.
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
from partpar.sampling import DistLinkNeighborLoader, blocks


class LinkPredictor(torch.nn.Module):
    r"""Rows of a table, GraphSAGE over them, and a product of both ends.

    Args:
        num_nodes: Rows of the table.
        hidden: Columns.
        num_layers: Of GraphSAGE.
    """

    def __init__(self, num_nodes: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(num_nodes, hidden)
        self.encoder = GraphSAGE(hidden, hidden, num_layers, hidden)
        self.source, self.destination = (torch.nn.Linear(2 * hidden, hidden) for _ in range(2))

    def forward(self, batch: Any) -> Tensor:
        r"""``[links]``: how likely each is."""
        x = self.table(batch.n_id)
        found = self.encoder(x, blocks(batch))
        ends = torch.cat([found, x[: found.size(0)]], 1)
        source, destination = batch.edge_label_index
        return (self.source(ends[source]) * self.destination(ends[destination])).sum(1)


def main() -> None:
    r"""Sets up, partitions if need be, trains, and prints what came out."""
    args = parse()
    with training.init(timeout=args.timeout) as worker:
        training.first_rank(lambda: partition(args, worker.world_size), worker.group)
        share = GraphData.load_partition(root(args), worker.rank, worker.world_size)
        loaders = {split: loader_of(share, split, args) for split in ("train", "val", "test")}

        torch.manual_seed(args.seed)
        inner = LinkPredictor(int(share.offsets()[-1]), args.hidden, len(args.fanouts))
        model = DistributedDataParallel(inner) if worker.world_size > 1 else inner
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

        def loss_of(batch: Any) -> tuple[Tensor, int]:
            return F.binary_cross_entropy_with_logits(model(batch), batch.edge_label), batch.edge_label.numel()

        def auc(split: str) -> float:
            told = [(inner(batch), batch.edge_label) for batch in loaders[split]]
            scores, labels = (torch.cat(pieces) for pieces in zip(*told, strict=True)) if told else (torch.empty(0),) * 2
            rows = training.all_rows(torch.stack([scores, labels], 1), worker.group)
            return training.roc_auc(rows[:, 0], rows[:, 1].long(), torch.ones(rows.size(0), dtype=torch.bool))

        def evaluate() -> dict[str, float]:
            return {split: auc(split) for split in ("val", "test")}

        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        with training.open_checkpoints(args, {"model": model, "optimizer": optimizer, **loaders}, worker.group) as checkpoints:
            history = training.fit_batches(
                model, optimizer, loaders["train"], loss_of, evaluate, args.epochs, worker.group, log.write, worker.is_first, checkpoints
            )
        for loader in loaders.values():
            loader.close()
        if worker.is_first:
            title = f"Links of {args.npz.stem}, {worker.world_size} worker(s)"
            Console().print(training.batch_summary_table(history, "auc", title))


def loader_of(share: GraphData, split: str, args: argparse.Namespace) -> DistLinkNeighborLoader:
    r"""The links of a split that lead to nodes owned here, each with a negative one."""
    edges, (row, col) = share.edge(), share.edge_index()
    mine = edges[f"{split}_mask"]
    links = torch.stack([share.node("src")["raw_ids"][row[mine]], share.node()["raw_ids"][col[mine]]])
    # An edge is known from the moment after it: of a link's own past, it is not part.
    return DistLinkNeighborLoader(
        share,
        args.fanouts,
        links,
        edge_label_time=edges["t"][mine] - 1,
        time_attr="t",
        temporal_strategy="last",
        neg_sampling="binary",
        batch_size=args.batch_size,
        shuffle=split == "train",
        seed=args.seed,
        attributes=[],
    )


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--npz", type=Path, required=True, help="a file of src, dst and t, see partpar.datasets.from_npz")
    parser.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<file>)")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10], help="latest neighbours to draw in each hop")
    parser.add_argument("--batch-size", type=int, default=256, help="links of a batch, on each worker")
    parser.add_argument("--hidden", type=int, default=32, help="columns of rows")
    parser.add_argument("--epochs", type=int, default=5, help="how many")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0, help="of the partition, samples and weights")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another worker")
    parser.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    return parser.parse_args()


def root(args: argparse.Namespace) -> Path:
    r"""The folder of this graph's partitions."""
    return args.root or Path("partitions") / f"{args.npz.stem}_links"


def partition(args: argparse.Namespace, num_parts: int) -> str:
    r"""Splits the links by time and cuts the graph, unless it was cut so before."""
    data = datasets.from_npz(args.npz)
    place = data.t.argsort(stable=True).argsort() / data.t.numel()
    data.train_mask, data.val_mask, data.test_mask = place < 0.8, (place >= 0.8) & (place < 0.9), place >= 0.9
    graph = GraphData.from_pyg_data(data)
    return str(graph.partition_graph(root(args), num_parts, partition_kwargs={"seed": args.seed}))


if __name__ == "__main__":
    main()
