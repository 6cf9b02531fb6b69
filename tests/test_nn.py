r"""Layers and models: PyG's own in one process, and their exact pieces on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph
from shares import HandmadeShare, assignments, cut
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch_geometric.utils import spmm

from partpar import Route, exchange, models, nn
from partpar.errors import GraphError
from partpar.kernels.adjacency import Adjacency
from partpar.nn.neighbour_sum import plan_sum

ZOO: list[tuple[str, dict[str, Any], str]] = [
    ("GCN", {}, ""),
    ("GCN", {"improved": True, "jk": "cat"}, "edge_weight"),
    ("GCN", {"normalize": False, "cached": True, "bias": False}, "edge_weight"),
    ("GCN", {"add_self_loops": False, "cached": True, "norm_kwargs": {"momentum": None}}, ""),
    ("GraphSAGE", {"jk": "lstm"}, ""),
    ("GraphSAGE", {"project": True, "normalize": True, "aggr": "max", "act_first": True}, ""),
    ("GraphSAGE", {"aggr": ["mean", "softmax"], "norm": "layer_norm", "norm_kwargs": {"mode": "node"}}, ""),
    ("GAT", {"heads": 2}, ""),
    ("GAT", {"heads": 2, "edge_dim": 3, "residual": True, "jk": "last", "fill_value": "max"}, "edge_attr"),
    ("GAT", {"heads": 2, "v2": True, "edge_dim": 3, "residual": True}, "edge_attr"),
    ("GAT", {"heads": 3, "v2": True, "share_weights": True, "add_self_loops": False, "concat": False}, ""),
    ("GIN", {"train_eps": True, "jk": "max"}, ""),
    ("GIN", {"eps": 0.3, "norm": None, "act": "tanh"}, ""),
]
IDS = [f"{name}-{'-'.join(map(str, options))}" for name, options, _ in ZOO]


def zoo_pair(name: str, options: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    r"""PyG's model and ours with its weights."""
    torch.manual_seed(0)
    arguments = (8, 12, 3, 4), {"norm": "batch_norm", **options}
    theirs = getattr(pyg, name)(*arguments[0], **arguments[1]).double()
    ours = getattr(models, name)(*arguments[0], **arguments[1]).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(("name", "options", "attribute"), ZOO, ids=IDS)
def test_models_are_pygs_in_one_process(name: str, options: dict[str, Any], attribute: str) -> None:
    data = directed_graph()
    theirs, ours = zoo_pair(name, options)
    theirs.load_state_dict(ours.state_dict())  # weights move both ways
    per_edge = {attribute: data[attribute]} if attribute else {}
    for route in (None, Route.trivial(data.num_nodes)):
        expected, found = (
            theirs(data.x, data.edge_index, **per_edge),
            ours(data.x, data.edge_index, route, **per_edge),
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for model, out in ((theirs, expected), (ours, found)):
            model.zero_grad()
            F.cross_entropy(out, data.y).backward()
        for (key, a), (other, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
            assert key == other
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-12)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(
        ours(data.x, data.edge_index, **per_edge), theirs(data.x, data.edge_index, **per_edge)
    )
    before = [p.clone() for p in ours.parameters()]
    ours.reset_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


# --- layers on several workers ------------------------------------------------------------------------------


def mlp(norm: type[torch.nn.Module] | None = None) -> Sequential:
    return Sequential(Linear(8, 8), *([norm(8)] if norm else []), ReLU(), Linear(8, 6))


class UserConv(pyg.MessagePassing):
    r"""A layer of the user's own: messages depend on both ends and the edge."""

    def __init__(self) -> None:
        super().__init__(aggr="max")
        self.lin = Linear(8 + 8 + 3, 6)

    def forward(
        self, x: Tensor, edge_index: Tensor, route: Route | None = None, edge_attr: Tensor | None = None
    ) -> Tensor:
        dst_len = x.size(0)
        x = x if route is None else route.apply(x)
        return self.propagate(edge_index, x=x, edge_attr=edge_attr)[:dst_len]

    def message(self, x_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        return self.lin(torch.cat([x_i, x_j, edge_attr], -1)).sigmoid()


# Name: ours, PyG's, edge attribute (as another argument).
LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], torch.nn.Module], str]] = {
    "GCN": (lambda: nn.GCNConv(8, 6), lambda: pyg.GCNConv(8, 6), ""),
    "GCN weights": (
        lambda: nn.GCNConv(8, 6, improved=True),
        lambda: pyg.GCNConv(8, 6, improved=True),
        "edge_weight",
    ),
    "GCN loops": (
        lambda: nn.GCNConv(8, 6, add_self_loops=False),
        lambda: pyg.GCNConv(8, 6, add_self_loops=False),
        "",
    ),
    "GCN wide": (lambda: nn.GCNConv(8, 20), lambda: pyg.GCNConv(8, 20), ""),
    "GCN narrow": (lambda: nn.GCNConv(8, 3), lambda: pyg.GCNConv(8, 3), "edge_weight"),
    "SAGE narrow": (lambda: nn.SAGEConv(8, 3), lambda: pyg.SAGEConv(8, 3), ""),
    "SAGE sum": (lambda: nn.SAGEConv(8, 5, aggr="sum"), lambda: pyg.SAGEConv(8, 5, aggr="sum"), ""),
    "SAGE": (lambda: nn.SAGEConv(8, 6), lambda: pyg.SAGEConv(8, 6), ""),
    "SAGE max": (
        lambda: nn.SAGEConv(8, 6, aggr="max", project=True),
        lambda: pyg.SAGEConv(8, 6, aggr="max", project=True),
        "",
    ),
    "SAGE softmax": (
        lambda: nn.SAGEConv(
            8, 6, aggr="softmax", aggr_kwargs={"learn": True}, root_weight=False, normalize=True
        ),
        lambda: pyg.SAGEConv(
            8, 6, aggr="softmax", aggr_kwargs={"learn": True}, root_weight=False, normalize=True
        ),
        "",
    ),
    "GAT": (lambda: nn.GATConv(8, 3, heads=2), lambda: pyg.GATConv(8, 3, heads=2), ""),
    "GAT pair": (
        lambda: nn.GATConv((8, 8), 6, concat=False),
        lambda: pyg.GATConv((8, 8), 6, concat=False),
        "",
    ),
    "GAT edges": (
        lambda: nn.GATConv(8, 3, heads=2, edge_dim=3, residual=True),
        lambda: pyg.GATConv(8, 3, heads=2, edge_dim=3, residual=True),
        "edge_attr",
    ),
    "GAT no loops": (
        lambda: nn.GATConv(8, 6, edge_dim=1, add_self_loops=False),
        lambda: pyg.GATConv(8, 6, edge_dim=1, add_self_loops=False),
        "edge_attr=edge_weight",
    ),
    "GATv2": (
        lambda: nn.GATv2Conv(8, 3, heads=2, edge_dim=3),
        lambda: pyg.GATv2Conv(8, 3, heads=2, edge_dim=3),
        "edge_attr",
    ),
    "GIN": (
        lambda: nn.GINConv(mlp(nn.SyncBatchNorm), train_eps=True),
        lambda: pyg.GINConv(mlp(pyg.BatchNorm), train_eps=True),
        "",
    ),
    "GINE": (lambda: nn.GINEConv(mlp(), edge_dim=3), lambda: pyg.GINEConv(mlp(), edge_dim=3), "edge_attr"),
    "Transformer": (
        lambda: nn.RoutedConv(pyg.TransformerConv(8, 3, heads=2, edge_dim=3)),
        lambda: pyg.TransformerConv(8, 3, heads=2, edge_dim=3),
        "edge_attr",
    ),
    "routed GAT": (lambda: nn.RoutedConv(pyg.GATConv(8, 3, heads=2)), lambda: pyg.GATConv(8, 3, heads=2), ""),
    "routed GraphConv": (
        lambda: nn.RoutedConv(pyg.GraphConv(8, 6)),
        lambda: pyg.GraphConv(8, 6),
        "edge_weight",
    ),
    "user's": (UserConv, UserConv, "edge_attr"),
}


WAYS = ("edge_index", "adj", "kept")  # messages; kernels; kernels with constant rows and edge attributes


def edges_of(share: HandmadeShare, way: str) -> Tensor | Adjacency:
    if way == "edge_index":
        return share.edge_index
    return Adjacency.from_edge_index(share.edge_index, share.route.num_src, share.route.num_owned)


def layer_case(worker: Worker, way: str) -> dict[str, float]:
    r"""The largest error of outputs and gradients (rows, edge attributes, parameters) of every layer and
    partition."""
    data = directed_graph()
    weights = torch.randn(data.num_nodes, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors = {}
    for kind, assignment in assignments(data.num_nodes, worker.world_size).items():
        share = cut(data, assignment, worker.rank, worker.group)
        for name, (make, make_theirs, attribute) in LAYERS.items():
            torch.manual_seed(0)
            theirs = make_theirs().double()
            ours = make().double()
            ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))

            x = data.x.clone().requires_grad_()
            x_own = share.node("x").requires_grad_()
            given, given_own = {}, {}
            constant = way == "kept"
            if attribute:
                keyword, stored = attribute.split("=")[0], attribute.split("=")[-1]
                given[keyword] = data[stored].clone().requires_grad_()
                given_own[keyword] = share.edge(stored).requires_grad_(not constant)
            if name == "user's" and way != "edge_index":
                continue
            edges = edges_of(share, way)
            for _ in range(2):  # what was kept at the first call serves the second
                expected = theirs(x, data.edge_index, **given)
                rows = nn.keep_halo(x_own.detach(), share.route) if constant else x_own
                found = ours(rows, edges, share.route, **given_own)
            weight = weights[:, : expected.size(1)]
            (expected * weight).sum().backward()
            (found * weight[share.owned]).sum().backward()

            pairs = [(found.detach(), expected[share.owned].detach())]
            if not constant:
                pairs += [(x_own.grad, x.grad[share.owned])]
                pairs += [(given_own[a].grad, given[a].grad[share.edges]) for a in given]
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert a.grad is not None, "a worker without rows uses every parameter all the same"
                torch.distributed.all_reduce(a.grad, group=worker.group)
                pairs.append((a.grad, b.grad))
            worst = max(
                (float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs if a.numel()),
                default=0.0,
            )
            errors[f"{kind}: {name}"] = worst
    return errors


@pytest.mark.core_on(2)
@pytest.mark.parametrize("way", WAYS)
def test_layers_on_several_workers(gang: Gang, world_size: int, way: str) -> None:
    for rank, errors in enumerate(gang.run(layer_case, world_size, way)):
        assert len(errors) == 3 * (len(LAYERS) - (way != "edge_index"))
        wrong = {name: error for name, error in errors.items() if not error < 1e-10}
        assert not wrong, f"rank {rank}: {wrong}"


def traffic_case(worker: Worker) -> None:
    r"""Rows that never change are not sent; a narrow layer sends its narrow side."""
    data = directed_graph()
    share = cut(data, assignments(60, worker.world_size)["even"], worker.rank, worker.group)
    edges, route = edges_of(share, "adj"), share.route
    rows = nn.keep_halo(share.node("x"), route)
    wide = plan_sum(edges, route).bytes_per_peer(1, torch.float64)
    for layer, x, width in (
        (nn.GCNConv(8, 6), rows, 0),
        (nn.GCNConv(8, 2), rows, 0),
        (nn.SAGEConv(8, 6), rows, 0),
        (nn.SAGEConv(8, 2), share.node("x"), 2),
        (nn.SAGEConv(8, 20), share.node("x"), 8),
    ):
        layer.double()
        layer(x, edges, route)
        exchange.meter.reset()
        layer(x, edges, route)
        assert exchange.meter.bytes_sent == width * sum(wide), (layer, width)


def test_what_cannot_change_is_not_sent(gang: Gang) -> None:
    gang.run(traffic_case, 3)


class FusedConv(pyg.MessagePassing):
    r"""A user's layer that defines ``message_and_aggregate``."""

    def __init__(self, aggr: str) -> None:
        super().__init__(aggr=aggr)

    def forward(self, x: Tensor, adj_t: Any) -> Tensor:
        return self.propagate(adj_t, x=(x, None))

    def message_and_aggregate(self, adj_t: Any, x: Any) -> Tensor:
        return spmm(adj_t, x[0], reduce=self.aggr)


@pytest.mark.parametrize("aggr", ["sum", "mean", "max", "min"])
def test_users_fused_layer_runs_on_the_kernels(aggr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = directed_graph()
    adj = Adjacency.from_edge_index(data.edge_index, 60, 60)
    matrix = nn.AdjacencyMatrix(adj, torch.float64)
    grads = []
    for edges in (matrix, adj.torch_csr(torch.float64)):
        x = data.x.clone().requires_grad_()
        out = FusedConv(aggr)(x, edges)
        (out * data.x).sum().backward()
        grads.append((out.detach(), x.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
    monkeypatch.setattr(torch.sparse, "mm", None)  # what torch would run
    torch.testing.assert_close(matrix @ data.x[:, 0], adj.torch_csr(torch.float64) @ data.x[:, 0])
    assert "60 x 60" in repr(matrix) and matrix.to_torch().layout == torch.sparse_csr
    with pytest.raises(GraphError, match="expected a reduction of sum"):
        matrix._times(data.x, "prod")


@torch.no_grad()
def attention_case(worker: Worker) -> float:
    data = directed_graph()
    share = cut(data, assignments(60, worker.world_size)["even"], worker.rank, worker.group)
    conv = nn.GATConv(8, 3, heads=2).double()
    whole = pyg.GATConv(8, 3, heads=2).double()
    whole.load_state_dict(conv.state_dict())
    _, (edges, alpha) = conv(share.node("x"), share.edge_index, share.route, return_attention_weights=True)
    _, (all_edges, all_alpha) = whole(data.x, data.edge_index, return_attention_weights=True)
    table = torch.zeros(60, 60, 2, dtype=torch.float64).index_put(tuple(all_edges), all_alpha)
    return float((table[tuple(share.route.raw_ids[edges])] - alpha).abs().max())


def test_attention_weights(gang: Gang) -> None:
    assert max(gang.run(attention_case, 3)) < 1e-12


def model_case(worker: Worker, way: str, recompute: bool) -> dict[str, float]:
    data = directed_graph()
    share = cut(data, assignments(60, worker.world_size)["empty part"], worker.rank, worker.group)
    errors = {}
    for (name, options, attribute), key in zip(ZOO, IDS, strict=True):
        theirs, ours = zoo_pair(name, options)
        ours.recompute = recompute
        found = ours(
            nn.keep_halo(share.node("x"), share.route) if way == "kept" else share.node("x"),
            edges_of(share, way),
            share.route,
            **({attribute: share.edge(attribute)} if attribute else {}),
        )
        expected = theirs(data.x, data.edge_index, **({attribute: data[attribute]} if attribute else {}))
        loss = F.cross_entropy(expected, data.y)
        own_loss = nn.global_mean(
            F.cross_entropy(found, share.node("y"), reduction="none"), route=share.route
        )
        loss.backward(), own_loss.backward()
        pairs = [(own_loss.detach(), loss.detach()), (found.detach(), expected[share.owned].detach())]
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.distributed.all_reduce(a.grad, group=worker.group)
            pairs.append((a.grad / worker.world_size, b.grad))
        pairs += [
            (ours.state_dict()[key], value) for key, value in theirs.state_dict().items() if "running" in key
        ]
        errors[key] = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
    return errors


@pytest.mark.core_on(2)
@pytest.mark.parametrize("recompute", [False, True], ids=["remembered", "run again"])
@pytest.mark.parametrize("way", WAYS)
def test_models_on_several_workers(gang: Gang, world_size: int, way: str, recompute: bool) -> None:
    for errors in gang.run(model_case, world_size, way, recompute):
        assert not {name: error for name, error in errors.items() if not error < 1e-10}


@torch.no_grad()
def simple_case(worker: Worker) -> list[float]:
    data = directed_graph()
    share = cut(data, assignments(60, worker.world_size)["even"], worker.rank, worker.group)
    torch.manual_seed(0)
    net = models.SimpleNet(8, 5, 2, 4).double()
    whole = net(data.x, data.edge_index, Route.trivial(60))
    out = net(share.node("x"), share.edge_index, share.route)
    mean = pyg.SimpleConv(aggr="mean")(data.x, data.edge_index)
    first = net.convs[0](data.x, data.edge_index, Route.trivial(60))
    return [
        float((whole[share.owned] - out).abs().max()),
        float((F.relu(net.convs[0].linear(mean)) - first).abs().max()),
    ]


def test_simple_net(gang: Gang) -> None:
    assert max(max(errors) for errors in gang.run(simple_case, 3)) < 1e-12
    net = models.SimpleNet(8, 5, 2)
    net.reset_parameters()
    assert net(torch.randn(60, 8), directed_graph().edge_index, Route.trivial(60)).shape == (60, 5)
