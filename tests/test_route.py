r"""The route's algebra as properties, on 1 to 4 ranks, against rows looked up in the whole tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gang import Gang, Worker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partpar import Route, exchange
from partpar.errors import AgreementError, RouteError

SCENARIO = settings(max_examples=12, deadline=None, derandomize=True)


@dataclass
class Scenario:
    r"""Ids owned and wanted by one rank, drawn alike on every rank."""

    ids: Tensor
    dst: Tensor
    src: Tensor
    full: Tensor  # row i belongs to raw id ids[i]
    draw: torch.Generator

    def rows(self, raw_ids: Tensor) -> Tensor:
        values, at = self.ids.sort()
        return self.full[at[torch.searchsorted(values, raw_ids)]]


def scenario(worker: Worker, seed: int, num_nodes: int, shape: tuple[int, ...], canonical: bool) -> Scenario:
    common = torch.Generator().manual_seed(seed)
    ids = torch.randperm(10 * num_nodes + 1, generator=common)[:num_nodes] - 3
    skew = torch.rand(num_nodes, generator=common) ** 2  # some ranks may own nothing
    owner = (skew * worker.world_size).long()
    full = torch.randn(num_nodes, *shape, generator=common, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed + 1 + worker.rank)
    dst = ids[owner == worker.rank]
    wanted = torch.randint(
        num_nodes, (int(torch.randint(2 * num_nodes, (1,), generator=draw)),), generator=draw
    )
    src = ids[wanted]
    if canonical:
        src = torch.cat([dst, src[~torch.isin(src, dst)].unique()])
    return Scenario(ids, dst, src, full, draw)


def total(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def algebra(worker: Worker, seed: int, num_nodes: int, shape: tuple[int, ...], canonical: bool) -> None:
    s = scenario(worker, seed, num_nodes, shape, canonical)
    route = Route.from_raw_ids(s.src, s.dst)
    x, out = s.rows(s.dst), s.rows(s.src)
    assert torch.equal(route.apply(x), out)
    assert torch.equal(route.apply_begin(x).wait(), out)
    pair = route.apply_begin(x), route.apply_begin(2 * x)  # several in flight
    assert torch.equal(pair[1].wait(), 2 * out) and torch.equal(pair[0].wait(), out)

    # <apply(x), y> == <x, reduce(y)>, and autograd agrees, once and twice
    y = torch.randn(out.shape, generator=s.draw, dtype=torch.float64)
    left, right = total((out * y).sum()), total((x * route.reduce(y)).sum())
    assert torch.allclose(left, right, rtol=1e-12, atol=1e-12)
    for apply in (route.apply, lambda v: route.apply_begin(v).wait()):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad((apply(leaf) * y).sum(), leaf)
        assert torch.allclose(grad, route.reduce(y), rtol=1e-12, atol=1e-12)
        (once,) = torch.autograd.grad((apply(leaf) ** 3).sum(), leaf, create_graph=True)
        (twice,) = torch.autograd.grad((once * x).sum(), leaf)
        copies = route.reduce(torch.ones_like(out))
        assert torch.allclose(twice, 6 * x * x * copies, rtol=1e-10, atol=1e-10)

    # reductions against all copies gathered in one place
    copies_of = gather_copies(worker, s, y)
    for op in ("sum", "mean", "max", "min"):
        leaf = y.clone().requires_grad_()
        got = route.reduce(leaf, op)
        for row, raw_id in enumerate(s.dst.tolist()):
            rows = copies_of.get(raw_id)
            want = torch.zeros(shape, dtype=torch.float64) if rows is None else combine(rows, op)
            assert torch.allclose(got[row], want, rtol=1e-12, atol=1e-12), (op, raw_id)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert torch.allclose(
            total(grad.sum()),
            total(torch.tensor(float(num_live(s, copies_of, op, shape)), dtype=torch.float64)),
        )

    mask = torch.rand(s.src.numel(), generator=s.draw) < 0.5
    part, scratch = route.restrict(mask), Route.from_raw_ids(s.src[mask], s.dst)
    assert torch.equal(part.apply(x), out[mask]) and torch.equal(part.raw_ids, scratch.raw_ids)
    assert part.send_splits == scratch.send_splits and part.recv_splits == scratch.recv_splits
    assert torch.equal(part.send_index, scratch.send_index)
    assert (part.order is None) == (scratch.order is None)
    assert part.order is None or torch.equal(part.order, scratch.order)


def combine(rows: Tensor, op: str) -> Tensor:
    return {"sum": rows.sum, "mean": rows.mean, "max": rows.amax, "min": rows.amin}[op](0)


def num_live(s: Scenario, copies_of: dict[int, Tensor], op: str, shape: tuple[int, ...]) -> float:
    r"""What all gradients of ``reduce(y, op).sum()`` add up to: one for each output entry that has a copy at all."""
    width = torch.Size(shape).numel()
    own = [copies_of[i] for i in s.dst.tolist() if i in copies_of]
    return sum(rows.size(0) * width if op == "sum" else width for rows in own)


def gather_copies(worker: Worker, s: Scenario, y: Tensor) -> dict[int, Tensor]:
    gathered: list[Any] = [None] * worker.world_size
    dist.all_gather_object(gathered, (s.src, y))
    ids, rows = torch.cat([g[0] for g in gathered]), torch.cat([g[1] for g in gathered])
    return {int(i): rows[ids == i] for i in ids.unique()}


@pytest.mark.core_on(1, 3)
@pytest.mark.parametrize(
    "canonical", [pytest.param(True, marks=pytest.mark.soak), False], ids=["owned-first", "any-order"]
)
def test_algebra(gang: Gang, world_size: int, canonical: bool) -> None:
    @SCENARIO
    @given(st.integers(0, 2**20), st.integers(1, 30), st.sampled_from([(), (1,), (3,), (2, 3), (0,)]))
    def check(seed: int, num_nodes: int, shape: tuple[int, ...]) -> None:
        gang.run(algebra, world_size, seed, num_nodes, shape, canonical)

    check()


def traffic(worker: Worker, seed: int, width: int) -> None:
    s = scenario(worker, seed, 40, (width,), canonical=True)
    route = Route.from_raw_ids(s.src, s.dst)
    sent: list[tuple[Tensor, list[int]]] = []
    real = exchange.all_to_all

    def spy(out: Tensor, rows: Tensor, recv: list[int], send: list[int], **kwargs: Any) -> Any:
        sent.append((rows.clone(), send))
        return real(out, rows, recv, send, **kwargs)

    exchange.all_to_all = spy
    try:
        for dtype in (torch.float64, torch.bfloat16):
            sent.clear()
            exchange.meter.reset()
            route.apply(s.rows(s.dst).to(dtype))
            expected = route.bytes_per_peer(width, dtype)
            assert expected[worker.rank] == 0, "own rows must not travel"
            if worker.world_size == 1:
                assert not sent
                continue
            [(rows, splits)] = sent
            assert [n * width * rows.element_size() for n in splits] == expected
            assert exchange.meter.bytes_sent == sum(expected) and exchange.meter.messages == sum(
                n > 0 for n in splits
            )
    finally:
        exchange.all_to_all = real


@pytest.mark.core_on(1, 3)
def test_only_what_is_announced_travels(gang: Gang, world_size: int) -> None:
    for seed in range(5):
        gang.run(traffic, world_size, seed, 3)


def dtypes(worker: Worker) -> None:
    s = scenario(worker, 7, 25, (2,), canonical=True)
    route = Route.from_raw_ids(s.src, s.dst)
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.int64,
        torch.int16,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ):
        x = (s.rows(s.dst) * 10).to(dtype)
        assert torch.equal(route.apply(x), (s.rows(s.src) * 10).to(dtype)), dtype
    for dtype in (torch.bfloat16, torch.float32):
        leaf = s.rows(s.dst).to(dtype).requires_grad_()
        route.apply(leaf).sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert torch.equal(leaf.grad[:, 0], route.reduce(torch.ones(route.num_src, 1, dtype=dtype))[:, 0])
    # rows that are a view with gaps
    x = s.rows(s.dst).repeat(1, 2)[:, ::2]
    assert torch.equal(route.apply(x), s.rows(s.src).repeat(1, 2)[:, ::2])


@pytest.mark.core_on(1, 3)
def test_every_dtype_travels(gang: Gang, world_size: int) -> None:
    gang.run(dtypes, world_size)


def ties(worker: Worker) -> list[float]:
    r"""All ranks hold node 0 with the same value; rank 0 owns it."""
    dst = torch.tensor([0] if worker.rank == 0 else [worker.rank * 10])
    route = Route.from_raw_ids(torch.cat([dst, torch.tensor([0])]).unique(), dst)
    x = torch.ones(route.num_src, 1, dtype=torch.float64, requires_grad=True)
    out = route.reduce(x, "max")
    out[: 1 if worker.rank == 0 else 0].sum().backward()
    assert x.grad is not None
    return [float(g) for g in x.grad[route.raw_ids == 0]]


@pytest.mark.core_on(1, 4)
def test_ties_share_their_gradient(gang: Gang, world_size: int) -> None:
    shares = [g for rank in gang.run(ties, world_size) for g in rank]
    assert shares == pytest.approx([1 / world_size] * world_size)


def subgroup(worker: Worker) -> None:
    group = dist.new_group([1, 3])
    if worker.rank in (1, 3):
        mine, other = torch.tensor([worker.rank]), torch.tensor([4 - worker.rank])
        route = Route.from_raw_ids(torch.cat([mine, other]), mine, group)
        assert route.world_size == 2
        assert route.apply(mine[:, None].double())[:, 0].tolist() == [worker.rank, 4 - worker.rank]


def test_subgroup(gang: Gang) -> None:
    gang.run(subgroup, 4)


def test_alone_without_a_process_group() -> None:
    route = Route.from_raw_ids(torch.tensor([5, 2, 5]), torch.tensor([2, 5]))
    x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    out = route.apply(x)
    assert out[:, 0].tolist() == [2, 1, 2]
    out.sum().backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == [1, 2]
    assert Route.trivial(2).apply(x) is not None and route.world_size == 1
    with pytest.raises(RouteError, match="found id 7 in dst_ids of no rank"):
        Route.from_raw_ids(torch.tensor([7]), torch.tensor([2]))
    with pytest.raises(RouteError, match="found id 2 more than once"):
        Route.from_raw_ids(torch.tensor([2]), torch.tensor([2, 2]))
    with pytest.raises(RouteError, match=r"apply: expected 2 rows .* found a tensor of shape \(3, 1\)"):
        route.apply(torch.ones(3, 1))
    with pytest.raises(RouteError, match="expected op to be one of sum, mean, max, min; found 'prod'"):
        route.reduce(torch.ones(3, 1), "prod")


BAD = {
    "nobody owns": (RouteError, "found id 99 in dst_ids of no rank"),
    "two own": (RouteError, "expected one owner for each id, found id 0 in dst_ids of ranks 0 and 1"),
    "one owns twice": (
        RouteError,
        "rank 1: from_raw_ids: expected each id once in dst_ids, found id 1 more than once",
    ),
    "not int64": (
        RouteError,
        "rank 1: from_raw_ids: expected src_ids to be a 1-dimensional int64 tensor, found torch.float32",
    ),
    "rows": (RouteError, r"rank 1: apply: expected 1 rows .* found a tensor of shape \(2, 4\)"),
    "not a tensor": (RouteError, "rank 1: apply: expected a tensor of 1 rows, found list"),
    "width": (AgreementError, "ranks disagree on size of dimension 1: rank 0 has 4, rank 1 has 5"),
    "dimensions": (AgreementError, "ranks disagree on number of dimensions: rank 0 has 2, rank 1 has 3"),
    "dtype": (AgreementError, "ranks disagree on dtype: rank 0 has torch.float64, rank 1 has torch.float32"),
    "gradient": (AgreementError, "ranks disagree on requires_grad: rank 0 has False, rank 1 has True"),
    "call": (AgreementError, r"ranks are in different calls: rank 0 in apply, rank 1 in reduce\(sum\)"),
    "mask": (
        RouteError,
        r"rank 1: restrict: expected a bool mask of shape \(2,\), found torch.bool of shape \(3,\)",
    ),
}


def misuse(worker: Worker, what: str) -> None:
    odd = worker.rank == 1
    dst = torch.tensor([worker.rank])
    src = torch.tensor([worker.rank, 1 - worker.rank])
    if what == "nobody owns":
        Route.from_raw_ids(torch.tensor([99]) if odd else src, dst)
    elif what == "two own":
        Route.from_raw_ids(src, torch.tensor([0, 1]) if odd else dst)
    elif what == "one owns twice":
        Route.from_raw_ids(src, torch.tensor([1, 1]) if odd else dst)
    elif what == "not int64":
        Route.from_raw_ids(src.float() if odd else src, dst)
    route = Route.from_raw_ids(src, dst)
    x = torch.ones(1, 4, dtype=torch.float64)
    bad: dict[str, Any] = {
        "rows": x.repeat(2, 1), "not a tensor": [1.0], "width": torch.ones(1, 5, dtype=torch.float64),
        "dimensions": x[None].transpose(0, 1), "dtype": x.float(), "gradient": x.clone().requires_grad_(),
    }  # fmt: skip
    if what == "call" and odd:
        route.reduce(x.repeat(2, 1))
    if what == "mask":
        route.restrict(torch.ones(3 if odd else 2, dtype=torch.bool))
    route.apply(bad.get(what, x) if odd else x)


@pytest.mark.parametrize("what", BAD)
def test_misuse_raises_on_every_rank(gang: Gang, what: str) -> None:
    kind, message = BAD[what]
    errors = gang.run_expecting_errors(misuse, 2, what)
    for error in errors:
        assert error is not None, "a rank saw no error"
        assert error[0] == kind.__name__, error
        assert re.search(message, error[1]), error


def wrong_world(worker: Worker) -> None:
    Route.from_offsets(torch.arange(2), torch.arange(0), torch.tensor([0, 2, 4, 6]))


def test_wrong_world_size(gang: Gang) -> None:
    for error in gang.run_expecting_errors(wrong_world, 2):
        assert (
            error is not None and "expected as many ranks as the partition has parts (3), found 2" in error[1]
        )


def late_check(worker: Worker) -> None:
    r"""After the checked calls, a bad input still raises where it is given."""
    route = Route.from_raw_ids(
        torch.tensor([0, 1]) if worker.rank == 0 else torch.tensor([1, 0]), torch.tensor([worker.rank])
    )
    for _ in range(100):
        route.apply(torch.ones(1, 2))
    if worker.rank == 1:
        with pytest.raises(RouteError, match="expected 1 rows"):
            route.apply(torch.ones(2, 2))


def test_checks_go_on_locally(gang: Gang) -> None:
    gang.run(late_check, 2)


def rounded(worker: Worker) -> None:
    s = scenario(worker, 3, 30, (4,), canonical=True)
    exact = Route.from_raw_ids(s.src, s.dst)
    neutral, route = exact.with_policy(), exact.with_policy(wire_dtype=torch.bfloat16)
    x, out = s.rows(s.dst), s.rows(s.src)
    assert torch.equal(neutral.apply(x), out), "the neutral policy is bit-identical"
    exchange.meter.reset()
    got = route.apply(x)
    assert (
        exchange.meter.bytes_sent
        == sum(route.bytes_per_peer(4, torch.float64))
        == sum(exact.bytes_per_peer(4, torch.bfloat16))
    )
    assert torch.equal(got[: route.num_owned], x), "own rows are never rounded"
    halo, true = got[route.num_owned :], out[route.num_owned :]
    assert torch.equal(halo, true.bfloat16().double()) and bool(
        ((halo - true).abs() <= 2**-8 * true.abs()).all()
    )
    assert torch.equal(route.apply_begin(x).wait(), got)
    with torch.no_grad():
        assert torch.equal(route.apply(x), out), "approximations are off in evaluation"
    grads = []
    for apply in (route.apply, lambda v: route.apply_begin(v).wait()):
        leaf = x.clone().requires_grad_()
        apply(leaf).mul(out).sum().backward()
        grads.append(leaf.grad)
    want = exact.reduce(torch.cat([out[: route.num_owned], true.bfloat16().double()]))
    assert all(torch.allclose(g, want, rtol=1e-12, atol=1e-12) for g in grads if g is not None)
    with pytest.raises(RouteError, match="wire_dtype: expected one of"):
        exact.with_policy(wire_dtype=torch.int8)


@pytest.mark.core_on(2, 3)
def test_wire_dtype(gang: Gang, world_size: int) -> None:
    gang.run(rounded, world_size)
