r"""GIN on learned and on given rows, for nodes and for graphs, on 1 to 4 workers: the numbers of PyG in one process."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph, load_npz_graph, npz_path
from partpar.models import DistributedGIN, DistributedGINE
from shares import HandmadeShare, assignments, cut
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data
from torch_geometric.utils import scatter

from partpar import GraphData
from partpar.kernels.adjacency import Adjacency
from partpar.nn import DistributedGINConv, DistributedGINEConv, global_mean
from partpar.sharded import DistTensor, Normal, SparseAdam

STEPS, HIDDEN, LAYERS = 20, 8, 2


class StackedGINE(torch.nn.Module):
    r"""What :class:`DistributedGINE` is in PyG's words."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, num_layers: int, edge_dim: int) -> None:
        super().__init__()
        widths = [in_channels, *[hidden] * (num_layers - 1), out_channels]
        self.convs = torch.nn.ModuleList(
            pyg.GINEConv(pyg.MLP([a, b, b], norm=None), edge_dim=edge_dim)
            for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = conv(x, edge_index, edge_attr).relu()
        return self.convs[-1](x, edge_index, edge_attr)


class Run(NamedTuple):
    losses: Tensor
    grads: Tensor
    weights: Tensor
    rows: Tensor | None = None


@functools.cache
def load(name: str) -> Data:
    r"""``x``, ``edge_index``, ``edge_attr``, ``y`` and, of graphs, ``batch``."""
    if name == "mutag":
        with np.load(npz_path("mutag"), allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        sizes = arrays["node_ptr"].diff()
        return Data(
            x=F.one_hot(arrays["node_label"], 7).double(), edge_index=arrays["edge_index"], y=arrays["y"],
            edge_attr=F.one_hot(arrays["edge_label"], 4).double(), num_nodes=int(arrays["node_ptr"][-1]),
            batch=torch.arange(len(sizes)).repeat_interleave(sizes),
        )  # fmt: skip
    data = load_npz_graph(name) if name == "cora" else directed_graph()
    x = data.x.double()
    keep = x[:, :40] if name == "cora" else x
    draw = torch.Generator().manual_seed(0)
    attr = torch.randn(data.edge_index.size(1), 3, generator=draw, dtype=torch.float64)
    return Data(x=keep, edge_index=data.edge_index, edge_attr=attr, y=data.y, num_nodes=data.num_nodes)


def sizes(data: Data) -> tuple[int, int, int, int]:
    return data.x.size(1), HIDDEN, int(data.y.max()) + 1, LAYERS


def make(model: str, data: Data, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    if model == "GINE":
        return DistributedGINE(*sizes(data), edge_dim=data.edge_attr.size(1), **options).double()
    return DistributedGIN(*sizes(data), **options).double()


def train(parallel: torch.nn.Module, model: torch.nn.Module, loss_of: Any, sparse: Any = None, steps: int = STEPS) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, grads = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(parallel)
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
        if sparse is not None:
            sparse.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return Run(torch.stack(losses), torch.stack(grads), weights)


@functools.cache
def expected(model: str, name: str) -> tuple[Run, dict[str, Tensor]]:
    r"""PyG's own classes in one process."""
    data = load(name)
    started = make(model, data).state_dict()
    if model == "GINE":
        one: torch.nn.Module = StackedGINE(*sizes(data), data.edge_attr.size(1)).double()
    else:
        in_channels, hidden, out_channels, num_layers = sizes(data)
        one = pyg.models.GIN(in_channels, hidden, num_layers, out_channels).double()
    one.load_state_dict(started)
    attr = (data.edge_attr,) if model == "GINE" else ()

    def loss_of(one: torch.nn.Module) -> Tensor:
        out = one(data.x, data.edge_index, *attr)
        if "batch" in data:
            out = scatter(out, data.batch, 0, reduce="sum")
        return F.cross_entropy(out, data.y)

    return train(one, one, loss_of), started


def assigned(data: Data, world_size: int) -> Tensor:
    return assignments(int(data.num_nodes or 0), world_size)["even"]


def sharded_run(worker: Worker, model: str, name: str, started: dict[str, Tensor], by_kernel: bool) -> Run:
    data = load(name)
    share = cut(data, assigned(data, worker.world_size), worker.rank, worker.group)
    own = make(model, data)
    own.load_state_dict(started)
    parallel = DistributedDataParallel(own, process_group=worker.group) if worker.world_size > 1 else own
    edges, attr = edges_of(share, by_kernel)
    batch = share.node("batch") if "batch" in data else None

    def loss_of(parallel: torch.nn.Module) -> Tensor:
        given = attr if model == "GINE" else None
        out = parallel(share.node("x"), edges, given, batch, route=share.route)
        if batch is not None:  # every rank has the outputs of all graphs
            return F.cross_entropy(out, data.y)
        return global_mean(F.cross_entropy(out, share.node("y"), reduction="none"), None, share.route)

    return train(parallel, own, loss_of)


def edges_of(share: HandmadeShare, by_kernel: bool) -> tuple[Any, Tensor]:
    if not by_kernel:
        return share.edge_index, share.edge("edge_attr")
    adj = Adjacency.from_edge_index(share.edge_index, share.route.num_src, share.route.num_owned)
    return adj, share.edge("edge_attr")[adj.edge_ids]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


@pytest.mark.core_on(2)
@pytest.mark.parametrize("model", ["GIN", "GINE"])
@pytest.mark.parametrize("name", ["cora", "mutag"])
def test_training_equals_pyg(gang: Gang, world_size: int, model: str, name: str) -> None:
    alone, started = expected(model, name)
    for found in gang.run(sharded_run, world_size, model, name, started, world_size % 2 == 0, timeout=120):
        for ours, theirs in zip(found[:3], alone[:3], strict=True):
            assert difference(ours, theirs) < 1e-10
    assert alone.losses[-1] < alone.losses[0]


# --- learned rows --------------------------------------------------------------------------------------------


def learned_run(worker: Worker, with_x: bool, embedding_dim: int) -> Run:
    r"""Rows of nodes and of edges are learned; ids are raw, so tables are split evenly, whatever the cut."""
    data = load("directed")
    share = cut(data, assigned(data, worker.world_size), worker.rank, worker.group)
    own: Any = make(
        "GINE", data, use_dist_embedding=True, embedding_dim=embedding_dim, use_dist_edge_embedding=True,
        norm="batch_norm", dropout=0.3, jk="cat",
    )  # fmt: skip
    own.set_num_embeddings(int(data.num_nodes or 0), data.edge_index.size(1))
    assert {str(table.weight.dtype) for table in own.embeddings} == {"torch.float64"}
    sparse = SparseAdam(own.embeddings, lr=0.05, scale_grad=1 / worker.world_size)
    parallel = DistributedDataParallel(own, process_group=worker.group) if worker.world_size > 1 else own

    def loss_of(parallel: torch.nn.Module) -> Tensor:
        x = share.node("x") if with_x else None
        out = parallel(x, share.edge_index, node_ids=share.owned, edge_ids=share.edges, route=share.route)
        return global_mean(F.cross_entropy(out, share.node("y"), reduction="none"), None, share.route)

    run = train(parallel, own, loss_of, sparse, steps=5)
    rows = [table(torch.arange(table.num_embeddings)).detach().flatten() for table in own.embeddings]
    return run._replace(rows=torch.cat(rows))


@pytest.mark.core_on(3)
@pytest.mark.parametrize(("with_x", "embedding_dim"), [(True, 8), (False, 5)])
def test_learned_rows_are_those_of_one_worker(gang: Gang, world_size: int, with_x: bool, embedding_dim: int) -> None:
    alone = gang.run(learned_run, 1, with_x, embedding_dim)[0]
    for found in gang.run(learned_run, world_size, with_x, embedding_dim):
        for ours, theirs in zip(found, alone, strict=True):
            assert difference(ours, theirs) < 1e-10


def in_chunks(worker: Worker, model: str, chunk_size: int, jk: str | None) -> tuple[float, bool]:
    data = load("directed")
    share = cut(data, assigned(data, worker.world_size), worker.rank, worker.group)
    own = make(model, data, norm="batch_norm", jk=jk, use_dist_tensor=True, chunk_size=chunk_size)
    attr = share.edge("edge_attr") if model == "GINE" else None
    own(share.node("x"), share.edge_index, attr, route=share.route)  # running statistics
    own.eval()
    whole = own(share.node("x"), share.edge_index, attr, route=share.route).detach()
    asked: list[int] = []
    fetch = DistTensor.__getitem__
    DistTensor.__getitem__ = lambda self, ids: asked.append(len(ids)) or fetch(self, ids)  # type: ignore
    try:
        with torch.no_grad():
            pieces = own(share.node("x"), share.edge_index, attr, route=share.route)
    finally:
        DistTensor.__getitem__ = fetch  # type: ignore
    into = torch.bincount(share.edge_index[1], minlength=share.route.num_owned)
    most = max([int(chunk.sum()) for chunk in into.split(chunk_size)], default=0)
    return difference(pieces, whole) if len(whole) else 0.0, bool(asked) and max(asked) <= most


@pytest.mark.core_on(2)
@pytest.mark.parametrize(("model", "jk"), [("GIN", None), ("GINE", "cat")])
def test_inference_holds_a_chunk_and_is_exact(gang: Gang, world_size: int, model: str, jk: str | None) -> None:
    for error, small in gang.run(in_chunks, world_size, model, 7, jk):
        assert error < 1e-10
        assert small, "no more rows are fetched than the edges of a chunk have sources"


def layers(worker: Worker) -> None:
    data = load("directed")
    share = cut(data, assigned(data, worker.world_size), worker.rank, worker.group)
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)).double()
    rows = torch.randn(int(data.num_nodes or 0), 8, dtype=torch.float64)
    more = torch.randn(data.edge_index.size(1), 8, dtype=torch.float64)

    conv = DistributedGINConv(mlp, 0.5, True, True, 8, "of nodes", use_dist_tensor=True, chunk_size=5)
    conv.double().set_num_embeddings(len(rows))
    conv.learned.nodes.load_state_dict({"weight": rows})
    plain = pyg.GINConv(mlp, 0.5, True).double()
    edge = DistributedGINEConv(
        mlp, 0.5, use_dist_embedding=True, embedding_dim=8, use_dist_edge_embedding=True, edge_embedding_dim=8,
        use_dist_tensor=True, chunk_size=5,
    )  # fmt: skip
    edge.double().set_num_embeddings(len(rows), len(more))
    edge.learned.nodes.load_state_dict({"weight": rows})
    edge.learned.edges.load_state_dict({"weight": more})
    plain_edge = pyg.GINEConv(mlp, 0.5).double()
    for train in (True, False):
        conv.train(train), edge.train(train)
        with torch.set_grad_enabled(train):
            for x in (None, share.node("x")):
                whole = rows if x is None else rows + data.x
                out = conv(x, share.edge_index, share.route, share.owned)
                assert difference(out, plain(whole, data.edge_index)[share.owned]) < 1e-10 or not len(out)
                out = edge(x, share.edge_index, share.route, None, share.owned, share.edges)
                assert difference(out, plain_edge(whole, data.edge_index, more)[share.owned]) < 1e-10
    assert conv.output.shape == (len(rows), 4)


@pytest.mark.core_on(2)
def test_layers_with_learned_rows_equal_pyg_layers(gang: Gang, world_size: int) -> None:
    gang.run(layers, world_size)


def test_a_sampled_batch_updates_its_rows_only() -> None:
    data = load("directed")
    model: Any = make("GIN", data, use_dist_embedding=True)
    model.set_num_embeddings(60)
    table = model.embeddings[0]
    before, ids = table.weight.local_rows.clone(), torch.tensor([5, 17, 3, 40])
    blocks = [
        Adjacency.from_edge_index(torch.tensor([[1, 2, 3], [0, 0, 1]]), 4, 2),
        Adjacency.from_edge_index(torch.tensor([[1], [0]]), 2, 1),
    ]
    optimiser = SparseAdam(model.embeddings, lr=0.1)
    model(None, blocks, node_ids=ids).sum().backward()
    optimiser.step()
    changed = (table.weight.local_rows != before).any(1).nonzero().flatten()
    assert changed.tolist() == sorted(ids.tolist())


def test_what_is_missing_is_named() -> None:
    data = load("directed")
    plain, learned = make("GIN", data), make("GIN", data, use_dist_embedding=True)
    with pytest.raises(ValueError, match="expected rows, found None"):
        plain(None, data.edge_index)
    with pytest.raises(ValueError, match=r"call set_num_embeddings\(num_nodes\) first"):
        learned(None, data.edge_index, node_ids=torch.arange(60))
    learned.set_num_embeddings(60)
    with pytest.raises(ValueError, match="expected node_ids"):
        learned(None, data.edge_index)
    with pytest.raises(ValueError, match="expected rows of shape"):
        learned(data.x[:, :3], data.edge_index, node_ids=torch.arange(60))
    edges = make("GINE", data, use_dist_edge_embedding=True)
    with pytest.raises(ValueError, match="expected num_edges"):
        edges.set_num_embeddings(60)
    with pytest.raises(ValueError, match="expected pooling"):
        make("GIN", data, pooling="max")
    with pytest.raises(ValueError, match="expected embedding_dim of at least 1"):
        DistributedGINConv(torch.nn.Identity(), use_dist_embedding=True)


def on_a_partition(worker: Worker, root: str) -> Tensor:
    share = GraphData.load_partition(root, worker.rank, worker.world_size)
    route = share.to_route(worker.group)
    torch.manual_seed(0)
    model = DistributedGIN(4, 8, 4, 2, use_dist_embedding=True).double()
    model.set_num_embeddings(60, part_policy=share, init_func=Normal())
    nodes = share.node("dst")
    assert torch.equal(model.embeddings[0].weight.local_ids, nodes["ids"]), "rows live with their nodes"
    out = model(None, share.adj(), node_ids=nodes["ids"], route=route)
    assert torch.equal(out, model(None, share.adj(), route, node_ids=nodes["ids"])), "the third may be the route"
    return out.detach()


def test_rows_live_with_the_nodes_of_a_partition(gang: Gang, tmp_path: Any) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2)
    assert sum(len(out) for out in gang.run(on_a_partition, 2, str(tmp_path))) == 60
