r"""Sums and extremes against plain references, and what all aggregations share."""

import pytest
import torch
from bipartite import (
    PLAIN,
    TOLERANCE,
    assert_same,
    bipartite,
    large,
    normal,
    reference,
    reference_attention,
    reference_weighted,
    relaxed,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partpar.errors import GraphError
from partpar.kernels import aggregate
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.extrema import ExtremeByScatter
from partpar.kernels.linear import _sum_on_device


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", PLAIN)
@relaxed
@given(bipartite(), st.sampled_from([(3,), (2, 3), (0,), (1,), (2, 0)]), st.sampled_from(list(TOLERANCE)))
def test_plain_operations(
    op: str, case: tuple[Adjacency, torch.Generator], columns: tuple[int, ...], dtype: torch.dtype
) -> None:
    adj, generator = case
    x = normal(adj.num_src, *columns, generator=generator, dtype=dtype)
    wide = x if dtype == torch.float64 else x.to(torch.float32)
    ours, theirs = getattr(aggregate, f"aggregate_{op}")(adj, x), reference(adj, wide, op).to(dtype)
    assert_same(ours, theirs, (x,), TOLERANCE[dtype])


@pytest.mark.parametrize("op", PLAIN)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain_operations_beyond_one_thread(op: str, dtype: torch.dtype, threads: int) -> None:
    adj, x = large(), normal(700, 33, dtype=dtype)
    wide = x if dtype == torch.float64 else x.to(torch.float32)
    ours, theirs = getattr(aggregate, f"aggregate_{op}")(adj, x), reference(adj, wide, op).to(dtype)
    # A hub of 20 thousand terms of size one: the sum's own rounding grows with their root.
    assert_same(ours, theirs, (x,), TOLERANCE[dtype] * (10 if dtype == torch.float32 else 1))


@pytest.mark.parametrize("heads", [0, 1, 2], ids=["[E], no heads", "[E, 1]", "[E, 2]"])
@relaxed
@given(bipartite())
def test_weighted_sum(heads: int, case: tuple[Adjacency, torch.Generator]) -> None:
    adj, generator = case
    x = normal(adj.num_src, *(3,) if heads == 0 else (2, 3), generator=generator)
    weight = normal(adj.num_edges, *() if heads == 0 else (heads,), generator=generator)
    assert_same(
        aggregate.aggregate_sum(adj, x, weight), reference_weighted(adj, x, weight), (x, weight), 1e-12
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("heads", [(), (3,)], ids=["[E]", "[E, H]"])
def test_weighted_sum_beyond_one_thread(dtype: torch.dtype, heads: tuple[int, ...], threads: int) -> None:
    adj = large()
    x, weight = normal(700, *heads, 16, dtype=dtype), normal(adj.num_edges, *heads, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = reference_weighted(adj, x.to(wide), weight.to(wide)).to(dtype)
    assert_same(
        aggregate.aggregate_sum(adj, x, weight),
        theirs,
        (x, weight),
        TOLERANCE[dtype] * (10 if dtype == torch.float32 else 1),
    )


def test_a_constant_weight_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("the gradient of a constant was computed")

    monkeypatch.setattr("partpar.kernels.linear.edge_dot", never)
    adj, x = large(), normal(700, 4)
    aggregate.aggregate_sum(adj, x, torch.rand(adj.num_edges, dtype=torch.float64)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@relaxed
@given(bipartite(max_nodes=4))
def test_first_and_second_derivatives(case: tuple[Adjacency, torch.Generator]) -> None:
    adj, generator = case
    x, weight = normal(adj.num_src, 2, 2, generator=generator), normal(adj.num_edges, 2, generator=generator)
    logits, a_src = normal(adj.num_edges, 2, generator=generator), normal(adj.num_src, 2, generator=generator)
    a_dst, base = normal(adj.num_dst, 2, generator=generator), normal(adj.num_dst, 2, 2, generator=generator)
    scale = torch.rand(adj.num_edges, 2, generator=generator, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: aggregate.aggregate_mean(adj, x), (x,))
    torch.autograd.gradcheck(lambda x: aggregate.aggregate_max(adj, x), (x,))
    torch.autograd.gradcheck(lambda x: aggregate.aggregate_min(adj, x), (x,))
    torch.autograd.gradcheck(lambda x, w, b: aggregate.aggregate_sum(adj, x, w, out=b * 1), (x, weight, base))
    torch.autograd.gradcheck(lambda x, v: aggregate.aggregate_softmax(adj, x, v, scale), (x, logits))
    torch.autograd.gradcheck(
        lambda x, s, d, v: aggregate.aggregate_gat(adj, x, s, d, v), (x, a_src, a_dst, logits)
    )
    torch.autograd.gradgradcheck(lambda x, w: aggregate.aggregate_sum(adj, x, w), (x, weight))
    torch.autograd.gradgradcheck(lambda x: aggregate.aggregate_mean(adj, x), (x,))


@pytest.mark.parametrize("op", ["max", "softmax"])
def test_second_derivatives_that_do_not_exist_are_refused(op: str) -> None:
    adj, x = large(), normal(700, 1, 4)
    more = () if op == "max" else (normal(adj.num_edges, 1),)
    out = getattr(aggregate, f"aggregate_{op}")(adj, x, *more)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_the_sum_of_other_devices(heads: int) -> None:
    adj, x, weight = large(), normal(700, 3, 4).detach(), torch.rand(40_000, 3, dtype=torch.float64)
    theirs = reference_weighted(adj, x, weight[:, :heads]) if heads else reference(adj, x, "sum")
    ours = _sum_on_device(adj, x, weight[:, :heads] if heads else None)
    torch.testing.assert_close(ours.view_as(theirs), theirs)


@pytest.mark.parametrize("op", ["max", "min"])
@relaxed
@given(bipartite())
def test_ties_share_the_gradient_evenly(op: str, case: tuple[Adjacency, torch.Generator]) -> None:
    adj, generator = case
    x = torch.randint(-1, 2, (adj.num_src, 4), generator=generator).double().requires_grad_()
    ours = getattr(aggregate, f"aggregate_{op}")(adj, x)
    # Row by row with `amax`, whose gradient torch splits; that of `scatter_reduce` counts an entry too many
    # at zero.
    pieces = [
        x[adj.indices[start:end].long()] for start, end in zip(adj.indptr[:-1], adj.indptr[1:], strict=True)
    ]
    rows = [getattr(piece, f"a{op}")(0) if len(piece) else 0 * x.sum(0) for piece in pieces]
    theirs = torch.stack(rows) if rows else 0 * x[:0]
    assert_same(ours, theirs, (x,), 1e-12)
    assert_same(ExtremeByScatter.apply(adj, x, op == "max"), theirs, (x,), 1e-12)


@pytest.mark.parametrize("op", ["max", "min"])
def test_infinities_and_nan_pass_through(op: str) -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 1, 1, 2, 0, 3], [0, 0, 1, 1, 2, 2]]), 4, 4)
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-inf, 1.0], [-inf, inf], [nan, 0.0], [inf, -inf]])
    torch.testing.assert_close(
        getattr(aggregate, f"aggregate_{op}")(adj, x), reference(adj, x, op), equal_nan=True
    )


def test_a_hub_of_a_hundred_thousand_edges(threads: int) -> None:
    edges = 100_000
    adj = Adjacency.from_edge_index(
        torch.stack([torch.arange(edges) % 50, torch.zeros(edges, dtype=torch.int64)]), 50, 3
    )
    x, logits, weight = normal(50, 2, 4), normal(edges, 2), normal(edges)
    for op in PLAIN:
        assert_same(getattr(aggregate, f"aggregate_{op}")(adj, x), reference(adj, x, op), (x,), 1e-9)
    assert_same(
        aggregate.aggregate_sum(adj, x, weight), reference_weighted(adj, x, weight), (x, weight), 1e-9
    )
    assert_same(
        aggregate.aggregate_softmax(adj, x, logits),
        reference_attention(adj, x, logits, None),
        (x, logits),
        1e-9,
    )


@pytest.mark.parametrize(("num_src", "num_dst"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_graphs_without_edges(num_src: int, num_dst: int) -> None:
    adj = Adjacency.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_src, num_dst)
    for dtype in TOLERANCE:
        x = normal(num_src, 2, 3, dtype=dtype)
        outs = [getattr(aggregate, f"aggregate_{op}")(adj, x) for op in PLAIN]
        outs += [
            aggregate.aggregate_softmax(adj, x, normal(0, 2, dtype=dtype)),
            aggregate.aggregate_gat(adj, x, normal(num_src, 2, dtype=dtype), normal(num_dst, 2, dtype=dtype)),
        ]
        for out in outs:
            assert out.shape == (num_dst, 2, 3) and not out.any()
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.shape == x.shape and not grad.any()


def test_rows_need_not_be_contiguous() -> None:
    adj, x = large(), normal(5, 700, 2)
    turned = x.permute(1, 2, 0)
    for op in PLAIN:
        assert_same(
            getattr(aggregate, f"aggregate_{op}")(adj, turned), reference(adj, turned, op), (x,), 1e-10
        )
    logits = normal(2, adj.num_edges)
    assert_same(
        aggregate.aggregate_softmax(adj, turned, logits.t()),
        reference_attention(adj, turned, logits.t(), None),
        (x, logits),
        1e-10,
    )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    adj, x, before = large(), normal(700, 2, 32), torch.get_num_threads()
    logits = normal(adj.num_edges, 2)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = [
                aggregate.aggregate_sum(adj, x),
                aggregate.aggregate_max(adj, x),
                aggregate.aggregate_softmax(adj, x, logits),
            ]
            results.append(
                out + list(torch.autograd.grad(sum(part.square().sum() for part in out), (x, logits)))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 1], [0, 0]]), 2, 1)
    x = torch.ones(2, 1, 3)
    for said, call in [
        ("one for each source, found \\[3, 2\\]", lambda: aggregate.aggregate_sum(adj, torch.ones(3, 2))),
        ("floating-point", lambda: aggregate.aggregate_max(adj, torch.ones(2, 2, dtype=torch.int64))),
        ("`weight` of shape \\[2\\]", lambda: aggregate.aggregate_sum(adj, x, torch.ones(3))),
        (
            "`out` of torch.float32 \\[1, 1, 3\\]",
            lambda: aggregate.aggregate_sum(adj, x, out=torch.ones(2, 1, 3)),
        ),
        ("`logits`", lambda: aggregate.aggregate_softmax(adj, x, torch.ones(2, 2))),
        (
            "`a_dst` of shape \\[1, 1\\]",
            lambda: aggregate.aggregate_gat(adj, x, torch.ones(2, 1), torch.ones(2, 1)),
        ),
        ("constant `scale`", lambda: aggregate.aggregate_softmax(adj, x, torch.ones(2, 1), normal(2, 1))),
    ]:
        with pytest.raises(GraphError, match=said):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [(4,), (2, 2)])
def test_the_interior_and_then_the_boundary(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    r"""A sum is added to what another sum returned, in place, in every dtype."""
    adj = large()
    x = torch.randn(700, *columns, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    halves = adj.split(300)
    out = aggregate.aggregate_sum(halves.owned, x[:300])
    out = aggregate.aggregate_sum(halves.halo, x[300:], out=out)
    whole = aggregate.aggregate_sum(adj, x.detach().double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert float((out.detach() - whole).abs().max() / whole.abs().max()) < tolerance
    out.sum().backward()
    counts = torch.bincount(adj.indices, minlength=700).view(-1, *[1] * len(columns))
    assert x.grad is not None and torch.equal(x.grad.double(), counts.expand_as(x).to(dtype).double())


@relaxed
@given(bipartite(), st.sampled_from([(3,), (2, 3)]))
def test_sum_and_head_have_one_gradient(case: tuple[Adjacency, torch.Generator], columns: tuple[int, ...]) -> None:
    adj, draw = case
    if adj.num_dst > adj.num_src:
        adj = adj.transposed
    x = torch.randn(adj.num_src, *columns, dtype=torch.float64, generator=draw).requires_grad_()
    weights = torch.randn(2, adj.num_dst, *columns, dtype=torch.float64, generator=draw)

    def gradient(total: Tensor, head: Tensor) -> Tensor:
        return torch.autograd.grad(((total * weights[0]) ** 2 + (head * weights[1]) ** 2).sum(), x, create_graph=True)[0]

    found = gradient(*aggregate.aggregate_sum_and_head(adj, x))
    expected = gradient(aggregate.aggregate_sum(adj, x), x[: adj.num_dst])
    torch.testing.assert_close(found, expected)
    twice = [torch.autograd.grad((g * g.detach()).sum(), x)[0] for g in (found, expected)]
    torch.testing.assert_close(*twice)
