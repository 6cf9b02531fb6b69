r"""Batch normalisation over all workers: torch's own, whatever rows are where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from gang import Gang, Worker
from torch import Tensor

from partpar import Route, nn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": 0.7},
]


def own_rows(worker: Worker, num_rows: int, empty: bool) -> tuple[Tensor, Route]:
    r"""Which rows of a matrix are this rank's: uneven, and none on rank 0 where ``empty``."""
    draw = torch.Generator().manual_seed(1)
    low = 1 if empty and worker.world_size > 1 else 0
    owner = (
        torch.randint(low, worker.world_size, (num_rows,), generator=draw)
        if worker.world_size > 1
        else torch.zeros(num_rows)
    )
    ids = (owner == worker.rank).nonzero().flatten()
    return ids, Route.from_raw_ids(ids, ids, worker.group)


def norm_case(worker: Worker, wrapped: bool) -> float:
    worst = 0.0
    for empty in (False, True):
        ids, route = own_rows(worker, 37, empty)
        for options in OPTIONS:
            torch.manual_seed(0)
            theirs = (pyg.BatchNorm if wrapped else torch.nn.BatchNorm1d)(5, **options).double()
            ours = (nn.BatchNorm if wrapped else nn.SyncBatchNorm)(5, **options).double()
            for p in theirs.parameters():
                torch.nn.init.normal_(p)
            ours.load_state_dict(theirs.state_dict())
            for step in range(4):
                theirs.train(step < 3), ours.train(step < 3)
                whole = (torch.randn(37, 5, dtype=torch.float64) * 3 + 7).requires_grad_()
                part = whole.detach()[ids].requires_grad_()
                weight = torch.randn(37, 5, dtype=torch.float64)
                expected, found = theirs(whole), ours(part, route)
                theirs.zero_grad(), ours.zero_grad()
                (expected.sin() * weight).sum().backward()
                (found.sin() * weight[ids]).sum().backward()
                pairs = [(found.detach(), expected.detach()[ids]), (part.grad, whole.grad[ids])]
                for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                    torch.distributed.all_reduce(a.grad, group=worker.group)
                    pairs.append((a.grad, b.grad))
                assert ours.state_dict().keys() == theirs.state_dict().keys()
                pairs += list(zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
                worst = max([worst, *(float((a - b).abs().max()) for a, b in pairs if a.numel())])
    return worst


@pytest.mark.parametrize("wrapped", [False, True], ids=["torch's", "PyG's"])
def test_statistics_and_gradients_are_those_of_one_process(
    gang: Gang, world_size: int, wrapped: bool
) -> None:
    assert max(gang.run(norm_case, world_size, wrapped)) < 1e-10


def precision_case(worker: Worker, dtype: torch.dtype, offset: float) -> tuple[float, torch.dtype]:
    r"""The error of the output against float64, where the mean is far larger than the deviation."""
    ids, route = own_rows(worker, 4000, True)
    whole = (torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + offset).to(dtype)
    norm = nn.SyncBatchNorm(3)
    found = norm(whole[ids], route)
    expected = torch.nn.BatchNorm1d(3).double()(whole.double())[ids]
    return float((found - expected).abs().max()) if ids.numel() else 0.0, found.dtype


@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [(torch.float32, 0, 1e-6), (torch.float32, 3e4, 1e-6), (torch.bfloat16, 0, 2e-2)],
)
def test_precision(gang: Gang, dtype: torch.dtype, offset: float, tolerance: float) -> None:
    r"""In float32 with a mean of 30 thousand, the naive mean of squares less square of mean has no correct
    digit."""
    for error, kind in gang.run(precision_case, 3, dtype, offset):
        assert kind == dtype and error < tolerance


def gradient_case(worker: Worker) -> bool:
    r"""Second derivatives: each rank's numeric one against the analytic one, of a function of all ranks'
    rows."""
    ids, route = own_rows(worker, 6, False)
    norm = nn.SyncBatchNorm(2).double()
    rows = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def total(x: Tensor) -> Tensor:  # the gradient of every rank's sum with respect to this rank's rows
        return torch.autograd.grad(norm(x, route).sin().sum(), x, create_graph=True)[0].square().sum()

    x = rows[ids].requires_grad_()
    second = torch.autograd.grad(total(x), x)[0]
    whole = rows.clone().requires_grad_()
    reference = torch.nn.BatchNorm1d(2).double()
    first = torch.autograd.grad(reference(whole).sin().sum(), whole, create_graph=True)[0].square().sum()
    return torch.allclose(second, torch.autograd.grad(first, whole)[0][ids], rtol=0, atol=1e-10)


def test_double_backward(gang: Gang) -> None:
    assert all(gang.run(gradient_case, 3))


def single_case(worker: Worker, kind: str) -> tuple[int, ...]:
    r"""One row on the last rank, none elsewhere."""
    ids = torch.zeros(int(worker.rank == worker.world_size - 1), dtype=torch.int64)
    route = Route.from_raw_ids(ids, ids, worker.group)
    norm: torch.nn.Module = (
        nn.SyncBatchNorm(4) if kind == "torch's" else nn.BatchNorm(4, allow_single_element=True)
    )
    return tuple(norm(torch.ones(ids.numel(), 4), route).shape)


def test_one_row_in_all_is_refused_everywhere(gang: Gang) -> None:
    said = "Expected more than 1 value per channel when training, got input size torch.Size([1, 4])"
    for world_size in (1, 3):
        assert (
            gang.run_expecting_errors(single_case, world_size, "torch's")
            == [("ValueError", said)] * world_size
        )
    assert gang.run(single_case, 3, "PyG's, allowed") == [(0, 4), (0, 4), (1, 4)]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected rows of shape \(N, 4\), found \(3, 5\)"):
        nn.SyncBatchNorm(4)(torch.ones(3, 5), Route.trivial(3))
