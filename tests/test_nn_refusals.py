r"""Layers refuse what could not be exact, and inputs that do not fit, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph
from shares import assignments, cut
from test_nn import edges_of, mlp
from torch import Tensor
from torch.nn import Sequential

from partpar import Route, models, nn
from partpar.errors import RouteError
from partpar.kernels.adjacency import Adjacency

# --- refusals -----------------------------------------------------------------------------------------------


class Nested(torch.nn.Module):
    def __init__(self, *members: torch.nn.Module) -> None:
        super().__init__()
        self.members = Sequential(*members)

    def forward(self, x: Tensor) -> Tensor:
        return self.members(x)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "single tensor": (lambda: nn.RoutedConv(pyg.GCNConv(2, 2)), r"pair \(x_src, x_dst\), found GCNConv"),
    "several hops": (lambda: nn.RoutedConv(pyg.APPNP(2, 0.1)), "found APPNP"),
    "routed twice": (lambda: nn.RoutedConv(nn.SAGEConv(2, 2)), "found SAGEConv"),
    "flow": (lambda: nn.RoutedConv(pyg.SAGEConv(2, 2, flow="target_to_source")), "found 'target_to_source'"),
    "own flow": (
        lambda: nn.GATConv(2, 2, flow="target_to_source"),
        "GATConv: expected flow='source_to_target'",
    ),
    "norm inside": (
        lambda: nn.RoutedConv(pyg.GINConv(mlp(torch.nn.BatchNorm1d))),
        "BatchNorm1d.*use partpar.nn.SyncBatchNorm",
    ),
    "norm in GIN": (lambda: nn.GINConv(mlp(pyg.GraphNorm)), "GINConv: .*GraphNorm"),
    "norm in GINE": (lambda: nn.GINEConv(mlp(pyg.BatchNorm)), "GINEConv: .*BatchNorm"),
    "out of reach": (
        lambda: nn.GINConv(Nested(nn.SyncBatchNorm(2))),
        r"SyncBatchNorm \(at 'members.0'\).*hand it the route",
    ),
    "dropout out of reach": (lambda: nn.GINConv(Nested(nn.Dropout())), "found Dropout"),
    "graph norm": (lambda: models.GCN(2, 2, 2, norm="graph_norm"), "GCN: .*GraphNorm"),
    "layer norm": (lambda: models.GIN(2, 2, 2, norm="layer_norm"), "mode='node'"),
    "LSTM": (lambda: nn.SAGEConv(2, 2, aggr="lstm"), "without edges"),
    "heads": (lambda: models.GAT(2, 3, 2, heads=2), "divide the 3 channels of a layer, found 2"),
    "dropout": (lambda: nn.Dropout(1.5), r"in \[0, 1\], found 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cannot_be_right(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        make()


def test_refuses_inputs_that_do_not_fit() -> None:
    data = directed_graph()
    x, edges = data.x, data.edge_index
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(edges.size(1)), (60, 60), check_invariants=True)
    conv = nn.GCNConv(8, 4).double()
    for call, said in [
        (lambda: conv((x, x), edges), "found a tuple"),
        (lambda: conv(x, adjacency), "share.edge_index"),
        (lambda: conv(x, edges.t()), r"shape \(2, E\)"),
        (lambda: conv(x, edges, edge_weight=data.edge_weight[:-1]), "row for each of the 275 edges"),
        (lambda: nn.GATConv(8, 4)(x, edges, edge_attr=data.edge_attr[1:]), "edge_attr"),
        (lambda: nn.GATv2Conv(8, 4).double()(x, edges, edge_attr=data.edge_attr), "set edge_dim"),
        (lambda: nn.GINEConv(mlp())(x, edges), "use GINConv"),
        (
            lambda: models.GraphSAGE(8, 4, 2)(x, edges, edge_weight=data.edge_weight),
            "expected no edge_weight",
        ),
        (lambda: conv(x[:-1], edges, Route.trivial(60)), "expected 60 rows"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    turned = Route.from_raw_ids(torch.arange(60).flip(0), torch.arange(60))
    for layer in (conv, nn.GATConv(8, 4).double(), nn.RoutedConv(pyg.SAGEConv(8, 4)).double()):
        with pytest.raises(RouteError, match="in another order"):
            layer(x, edges, turned)
    sage = nn.SAGEConv(8, 4).double()  # looks for no self-loops, so any order will do
    torch.testing.assert_close(sage(x, torch.stack([59 - edges[0], edges[1]]), turned), sage(x, edges))


def short_case(worker: Worker) -> None:
    data = directed_graph()
    share = cut(data, assignments(60, worker.world_size)["even"], worker.rank, worker.group)
    x = share.node("x")
    nn.GCNConv(8, 6).double()(x[1:] if worker.rank == 1 else x, edges_of(share, "adj"), share.route)


def test_rows_missing_on_one_rank_raise_on_every_rank(gang: Gang) -> None:
    for error in gang.run_expecting_errors(short_case, 2):
        assert error is not None
        assert error[0] == RouteError.__name__
        assert re.search(r"rank 1: GCNConv: expected \d+ rows \(one for each owned node\)", error[1])


def test_a_forgotten_route_is_named() -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 2], [0, 1]]), 3, 2)
    with pytest.raises(RouteError, match=r"pass route=share.to_route\(\)"):
        nn.SAGEConv(8, 6)(torch.ones(2, 8), adj)


def test_kept_rows_are_told_by_their_sizes() -> None:
    rows = nn.keep_halo(torch.zeros(3, 2), Route.trivial(3))
    assert repr(rows) == "SourceRows([3, 2] torch.float32, Route(rank 0 of 1: 3 owned, 0 halo, 0 sent))"
