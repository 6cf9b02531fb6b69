r"""Sums over in-neighbours of a cut graph equal those of the whole graph, however rows or partial sums travel."""

from __future__ import annotations

import os

import pytest
import torch
from gang import Gang, Worker
from graphs import directed_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from shares import cut
from torch_geometric.data import Data

from partpar import exchange
from partpar.errors import RouteError
from partpar.kernels.adjacency import Adjacency
from partpar.nn.neighbour_sum import plan_sum

DEVICE = os.environ.get("PARTPAR_TEST_DEVICE", "cpu")


def graph(kind: str, seed: int) -> Data:
    draw = torch.Generator().manual_seed(seed)
    if kind == "odd":
        return directed_graph(seed)
    # "fan-in": many sources, few destinations, so that partial sums are fewer than rows; "fan-out" the other way
    few, many = torch.randint(4, (300,), generator=draw), torch.randint(50, (300,), generator=draw)
    edge_index = torch.stack([many, few] if kind == "fan-in" else [few, many])
    return Data(
        edge_index=edge_index, edge_weight=torch.rand(300, generator=draw, dtype=torch.float64), num_nodes=50
    )


def sums(worker: Worker, kind: str, seed: int, weighted: bool, partial: bool) -> tuple[int, int]:
    data = graph(kind, seed)
    draw = torch.Generator().manual_seed(seed)
    num_nodes = int(data.num_nodes or 0)
    full = torch.randn(num_nodes, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(num_nodes, 3, generator=draw, dtype=torch.float64)
    assignment = torch.randint(worker.world_size, (num_nodes,), generator=draw)
    source, target = data.edge_index
    messages = full[source] * (data.edge_weight[:, None] if weighted else 1)
    want = torch.zeros_like(full).index_add(0, target, messages)
    (want_grad,) = torch.autograd.grad((want * cotangent).sum(), full, create_graph=True)
    (want_twice,) = torch.autograd.grad((want**3).sum(), full, create_graph=True)
    (want_twice,) = torch.autograd.grad((want_twice**2).sum(), full)

    share = cut(data, assignment, worker.rank, worker.group)
    adj = Adjacency.from_edge_index(share.edge_index, share.route.num_src, share.route.num_owned)
    weight = share.edge("edge_weight")[adj.edge_ids].to(DEVICE) if weighted else None
    plan = plan_sum(adj.to(DEVICE), share.route.to(DEVICE), weight, partial)
    full, want, cotangent = full.detach().to(DEVICE), want.detach().to(DEVICE), cotangent.to(DEVICE)
    want_grad, want_twice = want_grad.detach().to(DEVICE), want_twice.to(DEVICE)
    x = full[share.owned].requires_grad_()
    exchange.meter.reset()
    out = plan(x)
    sent = exchange.meter.bytes_sent
    assert sent == sum(plan.bytes_per_peer(3, torch.float64)), "bytes on the wire are those predicted"
    assert torch.allclose(out, want[share.owned], rtol=1e-12, atol=1e-12)
    base = plan(x, torch.ones_like(out))
    assert torch.allclose(base, want[share.owned] + 1, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((out * cotangent[share.owned]).sum(), x)
    assert torch.allclose(grad, want_grad[share.owned], rtol=1e-12, atol=1e-12)
    (once,) = torch.autograd.grad((plan(x) ** 3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad((once**2).sum(), x)
    assert torch.allclose(twice, want_twice[share.owned], rtol=1e-9, atol=1e-9)
    return sent, sum(share.route.bytes_per_peer(3, torch.float64))


@pytest.mark.core_on(3)
@pytest.mark.parametrize("partial", [True, False], ids=["partial", "rows"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_equals_the_whole_graph(gang: Gang, world_size: int, weighted: bool, partial: bool) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.sampled_from(["odd", "fan-in", "fan-out"]), st.integers(0, 1000))
    def check(kind: str, seed: int) -> None:
        gang.run(sums, world_size, kind, seed, weighted, partial)

    check()


def test_partial_sums_send_less(gang: Gang) -> None:
    for kind, saves in (("fan-in", True), ("fan-out", False)):
        pairs = gang.run(sums, 3, kind, 1, True, True)
        assert all(sent < rows if saves else sent == rows for sent, rows in pairs if rows), (kind, pairs)


def mismatch(worker: Worker) -> None:
    share = cut(directed_graph(), torch.arange(60) % 2, worker.rank, worker.group)
    adj = Adjacency.from_edge_index(
        share.edge_index, share.route.num_src + worker.rank, share.route.num_owned
    )
    plan_sum(adj, share.route)


def test_foreign_adjacency_raises_everywhere(gang: Gang) -> None:
    for error in gang.run_expecting_errors(mismatch, 2):
        assert error is not None and error[0] == RouteError.__name__
        assert "rank 1: expected the adjacency of the route's share" in error[1]
