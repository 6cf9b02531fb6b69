r"""Trains a classifier of one type's nodes on a whole typed graph, by any number of workers, with the numbers of one
process.

.. code-block:: console

    python examples/train_hetero_full_graph.py
    torchrun --standalone --nproc-per-node 2 examples/train_hetero_full_graph.py --model hgt
    torchrun --standalone --nproc-per-node 2 examples/train_hetero_full_graph.py --npz dblp_hetero.npz --target author

The first run with so many workers cuts the graph and writes a share for each; later runs open the shares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import HeteroData

from partpar import GraphData, HeteroRoute, datasets, nn, training
from partpar.nn import global_mean
from partpar.training.metrics import accuracy

MODELS = ("rgcn", "sage", "hgt", "han")


def main() -> None:
    r"""Sets up, partitions if need be, trains, and prints a line for each epoch."""
    args = parse()
    with training.init() as worker:
        training.first_rank(lambda: partition(args, worker.world_size), worker.group)
        share = GraphData.load_partition(args.root, worker.rank, worker.world_size)
        # 1. One route for all types: an exchange is one message to each worker, however many types there are.
        route: HeteroRoute = share.to_route(worker.group)
        owned = share.node(args.target)
        largest = int(owned["y"].max()) if share.num_owned(args.target) else 0
        num_classes = int(training.all_numbers([largest], route.group).max()) + 1
        x = {t: rows.to(args.dtype) for t, rows in share.collect("x").items()}

        torch.manual_seed(args.seed)
        widths = {t: rows.size(1) for t, rows in x.items()}
        inner = Classifier(args, widths, share.edge_types, num_classes).to(args.dtype)
        model = DistributedDataParallel(inner) if worker.world_size > 1 else inner
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        inputs = (x, share.adj_dict(), route)
        log = training.RunLog(args.metrics, args.logdir, worker.rank)
        state = {"model": model, "optimizer": optimizer}
        with training.open_checkpoints(args, state, worker.group) as checkpoints:
            checkpoints.resume()
            for epoch in range(checkpoints.step + 1, args.epochs + 1):
                optimizer.zero_grad()
                rows = F.cross_entropy(model(*inputs), owned["y"], reduction="none", ignore_index=-1)
                loss = global_mean(rows, owned["train_mask"], route)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    logits = inner(*inputs)
                scores = {
                    split: accuracy(logits, owned["y"], owned[f"{split}_mask"], route[args.target])
                    for split in ("train", "val", "test")
                    if f"{split}_mask" in owned
                }
                record = {"epoch": epoch, "loss": loss.item(), **scores}
                log.write(**record)
                if worker.is_first:
                    print(json.dumps(record), flush=True)
                checkpoints.save(epoch, force=epoch == args.epochs)


class Classifier(torch.nn.Module):
    r"""A linear map for each type, two layers over the relations, a linear map of the target's rows."""

    def __init__(
        self, args: argparse.Namespace, widths: dict[str, int], edge_types: list[Any], num_classes: int
    ) -> None:
        super().__init__()
        hidden, wanted = args.hidden, {args.target}
        make: Any = {
            "rgcn": lambda types, relations: nn.RGCNConv(hidden, hidden, relations),
            "sage": lambda types, relations: nn.HeteroSAGEConv(hidden, hidden, relations),
            "hgt": lambda types, relations: nn.HGTConv(hidden, hidden, (types, relations), heads=4),
            "han": lambda types, relations: nn.HANConv(hidden, hidden, (types, relations), heads=4),
        }[args.model]
        # 2. From the last layer to the first, each makes what the next one needs: no weight is there for nothing.
        layers: list[torch.nn.Module] = []
        self.types: list[list[str]] = []
        for _ in range(2):
            relations = [e for e in edge_types if e[2] in wanted]
            wanted |= {source for source, _, _ in relations}
            self.types.insert(0, [t for t in widths if t in wanted])
            layers.insert(0, make(self.types[0], relations))
        self.inputs = torch.nn.ModuleDict({t: torch.nn.Linear(widths[t], hidden) for t in self.types[0]})
        self.layers = torch.nn.ModuleList(layers)
        self.head, self.target = torch.nn.Linear(hidden, num_classes), args.target

    def forward(self, x: Any, edges: Any, route: HeteroRoute) -> Tensor:
        r"""``[num_owned, num_classes]`` of the target type (collective)."""
        # 3. A layer takes the rows of the owned nodes by type, the edges by relation, and the route.
        hidden = {t: F.relu(linear(x[t])) for t, linear in self.inputs.items()}
        for layer, types in zip(self.layers, self.types, strict=True):
            hidden = {t: hidden[t] for t in types}
            out = layer(hidden, edges, route)
            hidden = {t: rows if out.get(t) is None else F.relu(out[t]) for t, rows in hidden.items()}
        return self.head(hidden[self.target])


def generated(num_nodes: int, seed: int) -> HeteroData:
    r"""The planted graph with its nodes told apart into three types."""
    plain, data = datasets.planted(num_nodes, seed=seed), HeteroData()
    kind = torch.arange(num_nodes) % 3
    place = torch.stack([(kind == k).cumsum(0) - 1 for k in range(3)])[kind, torch.arange(num_nodes)]
    names = ("paper", "author", "term")
    for k, name in enumerate(names):
        data[name].x = plain.x[kind == k]
        if name == "paper":
            for attribute in ("y", "train_mask", "val_mask", "test_mask"):
                data[name][attribute] = plain[attribute][kind == k]
    source, destination = plain.edge_index
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            those = (kind[source] == i) & (kind[destination] == j)
            data[a, "to", b].edge_index = place[plain.edge_index[:, those]]
    return data


def partition(args: argparse.Namespace, num_parts: int) -> str:
    r"""Cuts the graph, unless this very graph was cut so before. Every type is spread evenly."""
    if args.npz is not None:
        data = datasets.from_npz(args.npz)
        for source, name, destination in list(data.edge_types):  # messages go both ways
            reverse = data[source, name, destination].edge_index.flip(0)
            data[destination, f"rev_{name}", source].edge_index = reverse
        draw = torch.Generator().manual_seed(args.seed)
        for t in data.node_types:
            if "x" not in data[t]:
                data[t].x = torch.randn(data[t].num_nodes, args.hidden, generator=draw)
    else:
        data = generated(args.nodes, args.seed)
    graph = GraphData.from_pyg_data(data)
    weights = ["#nodes:*", "train_mask:*"]
    return str(graph.partition_graph(args.root, num_parts, weights, overwrite=args.overwrite))


def parse() -> argparse.Namespace:
    r"""The options; ``--help`` prints them."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--npz", type=Path, help="a typed graph (default: a generated one)")
    parser.add_argument("--nodes", type=int, default=3000, help="nodes of the generated graph")
    parser.add_argument("--target", default="paper", help="the type whose nodes have y and masks")
    parser.add_argument("--root", type=Path, help="folder of partitions (default: partitions/<graph>)")
    parser.add_argument("--overwrite", action="store_true", help="replace a partition of another graph")
    parser.add_argument("--model", choices=MODELS, default="rgcn", help="kind of layer")
    parser.add_argument("--hidden", type=int, default=32, help="hidden channels")
    parser.add_argument("--epochs", type=int, default=30, help="steps on the whole graph")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of Adam")
    parser.add_argument("--seed", type=int, default=0, help="of the graph and weights")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of all rows")
    parser.add_argument("--metrics", type=Path, help="file to append a JSON line to for each epoch")
    parser.add_argument("--logdir", type=Path, help="folder of TensorBoard events to write to")
    training.add_checkpoint_arguments(parser)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    args.root = args.root or Path("partitions") / (args.npz.stem if args.npz else "planted_typed")
    return args


if __name__ == "__main__":
    main()
