r"""The mean over all labelled rows of all workers."""

from __future__ import annotations

import pytest
import torch
from gang import Gang, Worker
from torch import Tensor

from partpar import Route
from partpar.nn import global_mean


def rows_of(worker: Worker) -> slice:
    r"""Uneven pieces of 20 rows; with several ranks, rank 0 has the two first ones, which have no label."""
    bounds = {1: [0, 20], 2: [0, 2, 20], 3: [0, 2, 5, 20], 4: [0, 2, 5, 5, 20]}[worker.world_size]
    return slice(bounds[worker.rank], bounds[worker.rank + 1])


def mean_case(worker: Worker, how: str, dtype: torch.dtype) -> tuple[float, float]:
    r"""The value, and the error of the gradient averaged as DDP does."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64, generator=draw).to(dtype)
    mask = torch.rand(20, generator=draw) < 0.5
    mask[:2], mask[10] = False, True
    x[0], x[11 if not mask[11] else 12] = float("nan"), x[3]  # an unlabelled row that must not be looked at
    part = rows_of(worker)
    ids = torch.arange(20)[part]
    where = {"route": Route.from_raw_ids(ids, ids, worker.group)} if how == "route" else {}
    where = {"group": worker.group} if how == "group" else where

    def loss(weight: Tensor, rows: Tensor) -> Tensor:
        return (rows @ weight).square()

    weight = torch.ones(3, dtype=dtype, requires_grad=True)
    value = global_mean(
        loss(weight, x[part].nan_to_num()).where(~x[part].isnan().any(1), torch.nan), mask[part], **where
    )
    value.backward()
    torch.distributed.all_reduce(weight.grad, group=worker.group)
    reference = torch.ones(3, dtype=dtype, requires_grad=True)
    expected = loss(reference, x[mask]).mean()
    expected.backward()
    assert abs(float(value) - float(expected)) <= 4 * torch.finfo(dtype).eps * float(expected)
    return float(value), float(
        (weight.grad / worker.world_size - reference.grad).abs().max() / reference.grad.abs().max()
    )


@pytest.mark.core_on(1, 3)
@pytest.mark.parametrize("how", ["route", "group", "default"])
def test_value_and_gradient(gang: Gang, world_size: int, how: str) -> None:
    results = gang.run(mean_case, world_size, how, torch.float64)
    assert len({value for value, _ in results}) == 1, "the same bits on every rank"
    assert max(error for _, error in results) < 1e-14
    assert max(error for _, error in gang.run(mean_case, world_size, how, torch.float32)) < 1e-6


def trailing_case(worker: Worker) -> float:
    rows = torch.arange(60.0).view(20, 3)
    return float(global_mean(rows[rows_of(worker)]))


def test_trailing_dimensions_count(gang: Gang) -> None:
    assert gang.run(trailing_case, 3) == [29.5] * 3


def none_case(worker: Worker, masked: bool) -> None:
    rows = torch.ones(5 * masked, requires_grad=True)
    global_mean(rows, torch.zeros(5, dtype=torch.bool) if masked else None)


def test_no_row_at_all_is_an_error_everywhere(gang: Gang) -> None:
    for masked, why in ((True, "the mask is empty on every rank"), (False, "every rank has 0 rows")):
        said = f"global_mean: expected at least one row to average over, found none: {why}"
        assert gang.run_expecting_errors(none_case, 3, masked) == [("ValueError", said)] * 3


def test_without_torch_distributed() -> None:
    assert float(global_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]))) == 3.5


@pytest.mark.parametrize(
    ("loss", "mask", "said"),
    [
        (torch.tensor(1.0), None, "reduction='none'"),
        (torch.ones(3, dtype=torch.int64), None, "found torch.int64"),
        (torch.ones(3), torch.ones(2, dtype=torch.bool), r"shape \(3,\), found torch.bool of shape \(2,\)"),
        (torch.ones(3), torch.ones(3), "found torch.float32"),
        (torch.ones(3), Route.trivial(3), "found a Route in its place; pass route=route"),
    ],
)
def test_bad_input(loss: Tensor, mask: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        global_mean(loss, mask)
