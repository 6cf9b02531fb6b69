r"""Sharded tensors: what is wrong on one rank is told on every rank, and nothing hangs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from gang import Gang, Worker, launch

from partpar.sharded import DistEmbedding, DistTensor, Normal, SparseAdagrad, SparseAdam, lookup, node_split


def wrong(worker: Worker, what: str) -> None:
    r"""Rank 1 alone does something wrong."""
    t, bad = DistTensor((10, 3), name="t"), worker.rank == 1
    ids, rows = torch.tensor([1, 2]), torch.zeros(2, 3)
    if what == "range":
        t[torch.tensor([3, 10, -1]) if bad else ids]
    elif what == "range of a set":
        t[torch.tensor([3, -7]) if bad else ids] = rows
    elif what == "width":
        t[ids] = torch.zeros(2, 4) if bad else rows
    elif what == "dtype":
        t[ids] = rows.double() if bad else rows
    elif what == "ids":
        t[ids.float() if bad else ids]
    elif what == "name":
        DistTensor.attach("u" if bad else "t")
    elif what == "shape":
        DistTensor((10, 4 if bad else 3), name="t")
    elif what == "other call":
        if bad:
            t[ids] = rows
        else:
            t[ids]
    elif what == "other tensor":
        u = DistTensor((10, 3), name="u")
        (u if bad else t)[ids]
    elif what == "table":
        tables = [DistEmbedding(10, 3), DistEmbedding(10, 3)]
        lookup({tables[0]: ids, (t if bad else tables[1]): ids})  # type: ignore[dict-item]
    elif what == "policy":
        DistTensor((10, 3), name="v", part_policy=(0, 5, 9 if bad else 10))
    elif what == "disagree":
        DistTensor((10, 3 + bad), name="v")
    elif what == "init":
        DistTensor((10, 3), name="v", init_func=lambda shape, dtype: torch.zeros(1) if bad else torch.zeros(shape))
    else:
        node_split(torch.zeros(10) if bad else torch.zeros(10, dtype=torch.bool))


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("range", "IdError", "t: expected ids from 0 to 9, found 10 at place 1"),
        ("range of a set", "IdError", "t: expected ids from 0 to 9, found -7 at place 1"),
        ("width", "RouteError", "t: expected rows torch.float32 of shape (2, 3), found torch.float32 of shape (2, 4)"),
        ("dtype", "RouteError", "found torch.float64 of shape (2, 3)"),
        ("ids", "RouteError", "expected a 1-dimensional tensor of int64 or int32 ids, found torch.float32"),
        ("name", "RouteError", "expected the name of a tensor that is there ('t'), found 'u'"),
        ("shape", "RouteError", "choose another name"),
        ("other call", "AgreementError", "ranks are in different calls: rank 0 in gather of t, rank 1 in scatter of t"),
        ("other tensor", "AgreementError", "rank 0 in gather of t, rank 1 in gather of u"),
        ("table", "RouteError", "lookup: expected {DistEmbedding: ids}, found a DistTensor"),
        ("policy", "RouteError", "expected 10 rows in as many parts as there are workers (2), found 9 rows in 2 parts"),
        ("disagree", "AgreementError", "ranks disagree on size of dimension 1: rank 0 has 3, rank 1 has 4"),
        ("init", "RouteError", "init_func: expected a tensor of shape (5, 3), found shape (1,)"),
        ("split", "RouteError", "expected int64 ids or a bool mask, found torch.float32"),
    ],
)
def test_mistakes_of_one_rank_raise_on_all(gang: Gang, what: str, kind: str, message: str) -> None:
    other, own = gang.run_expecting_errors(wrong, 2, what, timeout=20)
    assert own is not None
    assert other is not None
    assert own[0] == kind or (own[0] == "RouteError" and other[0] == kind)
    assert message in own[1]
    assert message in other[1] or what == "shape"
    assert other[0] in ("RouteError", "AgreementError")


@pytest.mark.parametrize(
    "call",
    [
        lambda: DistEmbedding(4, 2, dtype=torch.float16),
        lambda: SparseAdam([]),
        lambda: SparseAdam(DistEmbedding(4, 2)),  # type: ignore[arg-type]
        lambda: DistEmbedding(4, 2, init_func=torch.nn.init.normal_),  # type: ignore[arg-type]
        lambda: SparseAdam([torch.nn.Embedding(4, 2)]),
        lambda: SparseAdagrad([DistEmbedding(4, 2)], lr=-1),
        lambda: SparseAdagrad([DistEmbedding(4, 2)], reduction="max"),
        lambda: SparseAdam([DistEmbedding(4, 2)], betas=(1.0, 0.9)),
        lambda: DistTensor(()),
        lambda: lookup({DistTensor((3, 2)): torch.tensor([1])}),  # type: ignore[dict-item]
        lambda: DistTensor((3, 0)),
        lambda: DistTensor((3,), torch.int64, init_func=Normal()),
        lambda: node_split(torch.tensor([1, 2])),
    ],
)
def test_arguments_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="expected .* found "):
        call()


def die(worker: Worker, what: str) -> None:
    table = DistEmbedding(100, 8, "e")
    optimiser = SparseAdam([table])
    for step in range(50):
        if worker.rank == 1 and step == 3:
            os._exit(7)
        rows = table(torch.arange(100))
        if what == "step" and worker.rank == 1 and step == 2:
            os._exit(7)
        rows.sum().backward()
        optimiser.step()


@pytest.mark.faults
@pytest.mark.parametrize("what", ["lookup", "step"])
def test_a_worker_that_dies_raises_on_the_others(what: str) -> None:
    outcomes = launch(die, 3, what, timeout=90, check=False)
    assert outcomes[1].exit_code == 7
    for rank in (0, 2):
        assert outcomes[rank].error is not None, outcomes[rank]
        assert not outcomes[rank].late


