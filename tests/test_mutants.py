r"""Mistakes put in on purpose, each of which the comparison with one process must notice; listed in
``MUTANTS.rst``.

Each mutant breaks one promise inside the workers, in one place. The same comparison without any passes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph
from shares import HandmadeShare, assignments, cut
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partpar import exchange, models, nn, route, transfer
from partpar.kernels.adjacency import Adjacency
from partpar.nn import neighbour_sum

NAMES = ("GCN", "GraphSAGE", "GAT", "GIN")
Patch = pytest.MonkeyPatch


def drop_a_halo_row(patch: Patch, share: HandmadeShare) -> None:
    apply = route.Route.apply

    def mutant(self: route.Route, x: Tensor) -> Tensor:
        keep = torch.ones(self.num_src, *[1] * (x.dim() - 1), dtype=x.dtype)
        keep[self.num_src - 1 :] = 0
        return apply(self, x) * keep

    patch.setattr(route.Route, "apply", mutant)


def swap_two_halo_rows(patch: Patch, share: HandmadeShare) -> None:
    apply = route.Route.apply

    def mutant(self: route.Route, x: Tensor) -> Tensor:
        order = torch.arange(self.num_src)
        order[-2:] = order[-2:].flip(0)
        return apply(self, x)[order]

    patch.setattr(route.Route, "apply", mutant)


def keep_halo_gradients(patch: Patch, share: HandmadeShare) -> None:
    apply = route.Route.apply

    def mutant(self: route.Route, x: Tensor) -> Tensor:
        out = apply(self, x)
        return torch.cat([out[: self.num_owned], out[self.num_owned :].detach()])

    patch.setattr(route.Route, "apply", mutant)


def swap_two_edges(patch: Patch, share: HandmadeShare) -> None:
    source, destination = share.edge_index
    other = int((source[0] != source).logical_and(destination[0] != destination).nonzero()[0])
    source[[0, other]] = source[[other, 0]]


def forget_an_edge(patch: Patch, share: HandmadeShare) -> None:
    share.edge_index = share.edge_index[:, 1:]


def local_statistics(patch: Patch, share: HandmadeShare) -> None:
    forward = nn.SyncBatchNorm.forward
    patch.setattr(nn.SyncBatchNorm, "forward", lambda self, x, route=None: forward(self, x, None))


def local_statistics_backwards(patch: Patch, share: HandmadeShare) -> None:
    backward = nn.norm._Normalise.backward

    def mutant(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with patch.context() as alone:
            alone.setattr(exchange, "all_reduce_sum", lambda x, group: x)
            return backward(ctx, *grads)

    patch.setattr(nn.norm._Normalise, "backward", staticmethod(mutant))


def rank_weighted_statistics(patch: Patch, share: HandmadeShare) -> None:
    r"""All ranks count alike, however many rows they have."""
    gather = exchange.all_gather

    def mutant(own: Tensor, group: Any) -> Tensor:
        slots = gather(own, group).clone()
        rows = slots[:, 3].clamp(min=1)
        return torch.stack([slots[:, 0] / rows, slots[:, 1] / rows, slots[:, 2], torch.ones_like(rows)], 1)

    patch.setattr(exchange, "all_gather", mutant)


def local_degrees(patch: Patch, share: HandmadeShare) -> None:
    def mutant(x: Tensor, route: Any) -> Tensor:
        halo = torch.bincount(share.edge_index[0], minlength=route.num_src)[route.num_owned :]
        return torch.cat([x, halo.clamp(min=1).to(x.dtype).pow(-0.5)]) if x.dim() == 1 else route.apply(x)

    patch.setattr(nn.gcn, "with_halo", mutant)


def local_count(patch: Patch, share: HandmadeShare) -> None:
    def mutant(loss_per_row: Tensor, mask: Tensor, route: Any) -> Tensor:
        return loss_per_row[mask].sum() / mask.sum().clamp(min=1)

    patch.setattr(nn.loss, "global_mean", mutant)


def unscaled_gradient(patch: Patch, share: HandmadeShare) -> None:
    patch.setattr(nn.loss._GlobalMean, "backward", staticmethod(lambda ctx, grad: (grad, None, None)))


def drop_by_local_id(patch: Patch, share: HandmadeShare) -> None:
    forward = nn.Dropout.forward
    patch.setattr(nn.Dropout, "forward", lambda self, x, route=None: forward(self, x, None))


def drop_edges_by_local_id(patch: Patch, share: HandmadeShare) -> None:
    drop = nn.Dropout.drop_edges
    patch.setattr(nn.Dropout, "drop_edges", lambda self, x, edges, route=None: drop(self, x, edges, None))


# --- of the kernels' way: with the share's adjacency ---------------------------------------------------------


def drop_a_received_slot(patch: Patch, share: HandmadeShare) -> None:
    wait = transfer.BlocksInFlight.wait

    def mutant(self: transfer.BlocksInFlight) -> Tensor:
        rows = wait(self)
        keep = torch.ones(rows.size(0), 1, dtype=rows.dtype)
        keep[rows.size(0) - 1 :] = 0
        return rows * keep

    patch.setattr(transfer.BlocksInFlight, "wait", mutant)


def forget_the_interior(patch: Patch, share: HandmadeShare) -> None:
    total = neighbour_sum.Edges.sum

    def mutant(self: neighbour_sum.Edges, x: Tensor, out: Tensor | None = None) -> Tensor:
        return total(self, x, None)  # the boundary alone is returned where it should be added

    patch.setattr(neighbour_sum.Edges, "sum", mutant)


def keep_slot_gradients(patch: Patch, share: HandmadeShare) -> None:
    patch.setattr(
        transfer._Start, "backward", staticmethod(lambda ctx, grad: (ctx.flight.backward.wait() * 0, None))
    )


def stale_halo(patch: Patch, share: HandmadeShare) -> None:
    r"""What constant rows are kept for is used for rows that change as well."""
    kept: dict[tuple[int, int], Tensor] = {}
    call = neighbour_sum.NeighbourSum.__call__

    def mutant(self: neighbour_sum.NeighbourSum, x: Tensor, base: Tensor | None = None) -> Tensor:
        out = call(self, x, base)
        return out + (kept.setdefault((id(self), x.size(1)), out.detach()) - out.detach())

    patch.setattr(neighbour_sum.NeighbourSum, "__call__", mutant)


def draw_again(patch: Patch, share: HandmadeShare) -> None:
    r"""A layer that is run again drops other entries."""
    patch.setattr(nn.dropout, "step_of", lambda advance: advance())


def drop_a_fetched_slot(patch: Patch, share: HandmadeShare) -> None:
    fetch = neighbour_sum.NeighbourSum.fetch

    def mutant(self: neighbour_sum.NeighbourSum, x: Tensor) -> Tensor:
        rows = fetch(self, x)
        rows[rows.size(0) - 1 :] = 0
        return rows

    patch.setattr(neighbour_sum.NeighbourSum, "fetch", mutant)


def keep_gradients_of_fetched_slots(patch: Patch, share: HandmadeShare) -> None:
    add = neighbour_sum.Edges.add_transposed
    patch.setattr(
        neighbour_sum.NeighbourSum, "add_transposed", lambda self, grad, out: add(self.own, grad, out)
    )


# Each mutant, and the model that it is seen on.
MUTANTS: list[tuple[Callable[[Patch, HandmadeShare], None], str]] = [
    (drop_a_halo_row, "GraphSAGE"),
    (swap_two_halo_rows, "GIN"),
    (keep_halo_gradients, "GCN"),
    (swap_two_edges, "GAT"),
    (forget_an_edge, "GCN"),
    (local_statistics, "GIN"),
    (local_statistics_backwards, "GraphSAGE"),
    (rank_weighted_statistics, "GCN"),
    (local_degrees, "GCN"),
    (local_count, "GAT"),
    (unscaled_gradient, "GraphSAGE"),
    (drop_by_local_id, "GIN"),
    (drop_edges_by_local_id, "GAT"),
]
BY_KERNEL: list[tuple[Callable[[Patch, HandmadeShare], None], str]] = [
    (drop_a_received_slot, "GIN"),
    (forget_the_interior, "GraphSAGE"),
    (keep_slot_gradients, "GCN"),
    (stale_halo, "GraphSAGE"),
    (draw_again, "GIN"),
]
# Of layers that go over their rows piece by piece, which they do where norms are of single rows.
STREAMED: list[tuple[Callable[[Patch, HandmadeShare], None], str]] = [
    (drop_a_fetched_slot, "GCN"),
    (keep_gradients_of_fetched_slots, "GraphSAGE"),
    (draw_again, "GIN"),
]
BATCH_NORM: dict[str, Any] = {"norm": "batch_norm"}
ROW_NORM: dict[str, Any] = {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}


def compare(
    worker: Worker,
    name: str,
    mutate: Callable[[Patch, HandmadeShare], None] | None,
    by_kernel: bool = False,
    norm: dict[str, Any] = BATCH_NORM,
) -> tuple[float, float]:
    r"""The largest errors of three steps' losses and gradients, without dropout against PyG in one process,
    with dropout against ours in one process. By kernels, layers are run again as well."""
    data = directed_graph()
    share = cut(data, assignments(data.num_nodes, worker.world_size)["even"], worker.rank, worker.group)
    trained: list[tuple[torch.nn.Module, list[tuple[Tensor, Tensor]]]] = []
    for p in (0.0, 0.5):
        torch.manual_seed(0)
        options = {**norm, "dropout": p, **({"heads": 2} if name == "GAT" else {})}
        model = getattr(models, name)(8, 8, 2, 4, **options).double()
        one = getattr(pyg if p == 0 else models, name)(8, 8, 2, 4, **options).double()
        one.load_state_dict(model.state_dict())
        model.recompute = by_kernel

        def loss(one: torch.nn.Module = one) -> Tensor:
            return F.cross_entropy(one(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask])

        trained.append((model, [step(one, loss) for _ in range(3)]))

    worst = [0.0, 0.0]
    with Patch.context() as patch:
        if mutate is not None:
            mutate(patch, share)
        edges: Any = share.edge_index
        if by_kernel:
            edges = Adjacency.from_edge_index(edges, share.route.num_src, share.route.num_owned)
        for i, (model, expected) in enumerate(trained):
            parallel = DistributedDataParallel(model, process_group=worker.group, broadcast_buffers=False)

            def own_loss(parallel: torch.nn.Module = parallel) -> Tensor:
                out = parallel(share.node("x"), edges, share.route)
                rows = F.cross_entropy(out, share.node("y"), reduction="none")
                return nn.loss.global_mean(rows, share.node("train_mask"), share.route)

            for pair in expected:
                for a, b in zip(step(model, own_loss), pair, strict=True):
                    worst[i] = max(worst[i], float(((a - b).abs() / b.abs().clamp(min=1)).max()))
    return worst[0], worst[1]


def step(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    r"""One step of gradient descent; the loss and the gradients that it took."""
    model.zero_grad()
    loss = loss_of()
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    return loss.detach(), grads


@pytest.mark.parametrize("by_kernel", [False, True], ids=["edge_index", "adj"])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_mutant_all_agree(gang: Gang, name: str, by_kernel: bool) -> None:
    assert max(max(errors) for errors in gang.run(compare, 3, name, None, by_kernel)) < 1e-10


@pytest.mark.parametrize(("mutate", "name"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_mutant_is_noticed(gang: Gang, mutate: Callable[[Patch, HandmadeShare], None], name: str) -> None:
    assert max(max(errors) for errors in gang.run(compare, 3, name, mutate)) > 1e-6


@pytest.mark.parametrize(("mutate", "name"), BY_KERNEL, ids=[mutate.__name__ for mutate, _ in BY_KERNEL])
def test_mutant_of_the_kernels_way_is_noticed(
    gang: Gang, mutate: Callable[[Patch, HandmadeShare], None], name: str
) -> None:
    assert max(max(errors) for errors in gang.run(compare, 3, name, mutate, True)) > 1e-6


@pytest.mark.parametrize("name", ["GCN", "GraphSAGE", "GIN"])
def test_streamed_layers_without_a_mutant_agree(gang: Gang, name: str) -> None:
    assert max(max(errors) for errors in gang.run(compare, 3, name, None, True, ROW_NORM)) < 1e-10


@pytest.mark.parametrize(("mutate", "name"), STREAMED, ids=[mutate.__name__ for mutate, _ in STREAMED])
def test_mutant_of_streamed_layers_is_noticed(
    gang: Gang, mutate: Callable[[Patch, HandmadeShare], None], name: str
) -> None:
    assert max(max(errors) for errors in gang.run(compare, 3, name, mutate, True, ROW_NORM)) > 1e-6


def test_all_are_listed() -> None:
    listed = Path(__file__).with_name("MUTANTS.rst").read_text()
    assert [
        mutate.__name__ for mutate, _ in MUTANTS + BY_KERNEL + STREAMED if f"``{mutate.__name__}``" not in listed
    ] == []
