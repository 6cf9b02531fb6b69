r"""Every kernel against a plain reference in torch operations, on graphs that are unkind."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from partpar.errors import GraphError
from partpar.kernels import aggregate
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.extrema import ExtremeByScatter
from partpar.kernels.softmax import attend_by_scatter

relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
PLAIN = ("sum", "mean", "max", "min")


@st.composite
def bipartite(draw: st.DrawFn, max_nodes: int = 7) -> tuple[Adjacency, torch.Generator]:
    num_src, num_dst = draw(st.integers(1, max_nodes)), draw(st.integers(0, max_nodes))
    end = st.tuples(st.integers(0, num_src - 1), st.integers(0, max(num_dst - 1, 0)))
    edges = draw(st.lists(end, max_size=20)) if num_dst else []
    edge_index = torch.tensor(edges, dtype=torch.int64).view(-1, 2).t()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return Adjacency.from_edge_index(edge_index, num_src, num_dst), generator


def large(num_src: int = 700, num_dst: int = 500, num_edges: int = 40_000, seed: int = 0) -> Adjacency:
    r"""Beyond the size that runs on one thread; half of all edges go into one hub, and some rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    dst = torch.randint(3, num_dst, (num_edges,), generator=generator)
    dst[::2] = 7
    return Adjacency.from_edge_index(torch.stack([torch.randint(num_src, (num_edges,), generator=generator), dst]),
                                     num_src, num_dst)


def messages(adj: Adjacency, x: Tensor) -> Tensor:
    return x[adj.indices.long()]


def reference(adj: Adjacency, x: Tensor, op: str) -> Tensor:
    return scatter(messages(adj, x), adj.destinations.long(), 0, adj.num_dst, op)


def normal(*shape: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    r"""Values, and the gradients of all inputs for one random direction."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(ours.dtype)
    grads = torch.autograd.grad(ours, inputs, direction, retain_graph=True)
    expected = torch.autograd.grad(theirs, inputs, direction, retain_graph=True, allow_unused=True)
    for grad, other in zip(grads, expected, strict=True):
        other = torch.zeros_like(grad) if other is None else other
        scale = tolerance * max(1.0, float(other.abs().max()) if other.numel() else 1.0)
        torch.testing.assert_close(grad, other, rtol=tolerance, atol=scale)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- the adjacency ---------------------------------------------------------------------------------------------------

@relaxed
@given(bipartite())
def test_transposing_moves_every_edge_once(case: tuple[Adjacency, torch.Generator]) -> None:
    adj, _ = case
    there = adj.transposed
    assert there.transposed is adj
    edges = torch.stack([adj.indices, adj.destinations])[:, adj.transpose_order.long()]
    assert torch.equal(edges, torch.stack([there.destinations, there.indices]))
    values = torch.arange(adj.num_edges, dtype=torch.float64)
    assert torch.equal(there.to_transpose(adj.to_transpose(values)), values)


@relaxed
@given(bipartite(), st.floats(0, 1))
def test_split_shares_out_all_edges(case: tuple[Adjacency, torch.Generator], part: float) -> None:
    adj, generator = case
    num_owned = round(part * adj.num_src)
    x, weight = normal(adj.num_src, 3, generator=generator), normal(adj.num_edges, generator=generator)
    split, base = adj.split(num_owned), normal(adj.num_dst, 1, 3, generator=generator)
    assert split.owned.num_src == num_owned and split.halo.num_src == adj.num_src - num_owned
    out = aggregate.aggregate_sum(split.owned, x[:num_owned], weight[split.owned_edges])
    out = aggregate.aggregate_sum(split.halo, x[num_owned:], weight[split.halo_edges], out=out)
    assert_same(out, reference_weighted(adj, x, weight), (x, weight), 1e-12)
    onto_view = aggregate.aggregate_sum(adj, x, weight, out=(base * 2).view(adj.num_dst, 3))
    assert_same(onto_view, 2 * base[:, 0] + reference_weighted(adj, x, weight), (x, weight, base), 1e-12)
    assert adj.split(num_owned) is split


def test_a_constant_weight_is_permuted_once_and_anew_after_a_change() -> None:
    adj, weight = large(), torch.rand(40_000)
    first = adj.to_transpose(weight)
    assert adj.to_transpose(weight) is first
    weight.mul_(2)
    assert torch.equal(adj.to_transpose(weight), 2 * first)


def test_edge_ids_point_into_the_given_edges() -> None:
    edge_index = torch.tensor([[3, 1, 2, 1], [1, 0, 1, 0]])
    adj = Adjacency.from_edge_index(edge_index, 4, 3)
    assert adj.edge_ids is not None and adj.edge_ids.tolist() == [1, 3, 0, 2]
    assert adj.indptr.tolist() == [0, 2, 4, 4]
    assert torch.equal(edge_index[0, adj.edge_ids], adj.indices.long())


def test_torch_csr_serves_pyg() -> None:
    adj = large()
    matrix = adj.torch_csr(torch.float64)
    assert matrix.shape == (500, 700) and matrix.col_indices().dtype == torch.int64
    x = normal(700, 4)
    torch.testing.assert_close(matrix @ x, aggregate.aggregate_sum(adj, x))


@pytest.mark.parametrize(("indptr", "indices", "said"), [
    ([0, 2], [0, 1], "found \\[2\\]"), ([0, 2, 1], [0], "falling"), ([0, 1, 2], [0, 3], "found 0..3"),
    ([0, 1, 2], [-1, 0], "found -1..0"), ([1, 1, 2], [0, 0], "from 1"), ([0, 1, 3], [0, 0], "to 3")])
def test_arrays_that_do_not_fit_are_refused(indptr: list[int], indices: list[int], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        Adjacency(torch.tensor(indptr), torch.tensor(indices), 3, 2)


def test_ends_out_of_bounds_are_refused() -> None:
    with pytest.raises(GraphError, match="sources in 0..1, found 0..2"):
        Adjacency.from_edge_index(torch.tensor([[0, 2], [0, 0]]), 2, 1)
    with pytest.raises(GraphError, match="destinations in 0..0, found 0..1"):
        Adjacency.from_edge_index(torch.tensor([[0, 1], [0, 1]]), 2, 1)


# --- the sums --------------------------------------------------------------------------------------------------------

def reference_weighted(adj: Adjacency, x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.view(*weight.shape, *[1] * (x.dim() - weight.dim()))
    return scatter(messages(adj, x) * weight, adj.destinations.long(), 0, adj.num_dst, "sum")


@pytest.mark.parametrize("op", PLAIN)
@relaxed
@given(bipartite(), st.sampled_from([(3,), (2, 3), (0,), (1,), (2, 0)]), st.sampled_from(list(TOLERANCE)))
def test_plain_operations(op: str, case: tuple[Adjacency, torch.Generator], columns: tuple[int, ...],
                          dtype: torch.dtype) -> None:
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
    assert_same(aggregate.aggregate_sum(adj, x, weight), reference_weighted(adj, x, weight), (x, weight), 1e-12)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("heads", [(), (3,)], ids=["[E]", "[E, H]"])
def test_weighted_sum_beyond_one_thread(dtype: torch.dtype, heads: tuple[int, ...], threads: int) -> None:
    adj = large()
    x, weight = normal(700, *heads, 16, dtype=dtype), normal(adj.num_edges, *heads, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = reference_weighted(adj, x.to(wide), weight.to(wide)).to(dtype)
    assert_same(aggregate.aggregate_sum(adj, x, weight), theirs, (x, weight),
                TOLERANCE[dtype] * (10 if dtype == torch.float32 else 1))


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
    torch.autograd.gradcheck(lambda x, s, d, v: aggregate.aggregate_gat(adj, x, s, d, v), (x, a_src, a_dst, logits))
    torch.autograd.gradgradcheck(lambda x, w: aggregate.aggregate_sum(adj, x, w), (x, weight))
    torch.autograd.gradgradcheck(lambda x: aggregate.aggregate_mean(adj, x), (x,))


@pytest.mark.parametrize("op", ["max", "softmax"])
def test_second_derivatives_that_do_not_exist_are_refused(op: str) -> None:
    adj, x = large(), normal(700, 1, 4)
    more = () if op == "max" else (normal(adj.num_edges, 1),)
    out = getattr(aggregate, f"aggregate_{op}")(adj, x, *more)
    grad, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- extremes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("op", ["max", "min"])
@relaxed
@given(bipartite())
def test_ties_share_the_gradient_evenly(op: str, case: tuple[Adjacency, torch.Generator]) -> None:
    adj, generator = case
    x = torch.randint(-1, 2, (adj.num_src, 4), generator=generator).double().requires_grad_()
    ours = getattr(aggregate, f"aggregate_{op}")(adj, x)
    # Row by row with `amax`, whose gradient torch splits; that of `scatter_reduce` counts an entry too many at zero.
    pieces = [x[adj.indices[start:end].long()] for start, end in zip(adj.indptr[:-1], adj.indptr[1:], strict=True)]
    rows = [getattr(piece, f"a{op}")(0) if len(piece) else 0 * x.sum(0) for piece in pieces]
    theirs = torch.stack(rows) if rows else 0 * x[:0]
    assert_same(ours, theirs, (x,), 1e-12)
    assert_same(ExtremeByScatter.apply(adj, x, op == "max"), theirs, (x,), 1e-12)


@pytest.mark.parametrize("op", ["max", "min"])
def test_infinities_and_nan_pass_through(op: str) -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 1, 1, 2, 0, 3], [0, 0, 1, 1, 2, 2]]), 4, 4)
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[-inf, 1.0], [-inf, inf], [nan, 0.0], [inf, -inf]])
    torch.testing.assert_close(getattr(aggregate, f"aggregate_{op}")(adj, x), reference(adj, x, op), equal_nan=True)


# --- attention -------------------------------------------------------------------------------------------------------

def reference_attention(adj: Adjacency, x: Tensor, logits: Tensor, scale: Tensor | None) -> Tensor:
    dst = adj.destinations.long()
    prob = softmax(logits, dst, num_nodes=adj.num_dst)
    return scatter(messages(adj, x) * (prob if scale is None else prob * scale).unsqueeze(-1), dst, 0, adj.num_dst, "sum")


def check_attention(adj: Adjacency, generator: torch.Generator, heads: int, width: int, dtype: torch.dtype,
                    tolerance: float) -> None:
    x, a_src = (normal(adj.num_src, *more, generator=generator, dtype=dtype) for more in ((heads, width), (heads,)))
    a_dst, a_edge = (normal(count, heads, generator=generator, dtype=dtype) for count in (adj.num_dst, adj.num_edges))
    scale = (torch.rand(adj.num_edges, heads, generator=generator, dtype=torch.float64) * 2).floor().to(dtype) * 2
    logits = a_src[adj.indices.long()] + a_dst[adj.destinations.long()]
    leaky = torch.nn.functional.leaky_relu
    assert_same(aggregate.aggregate_softmax(adj, x, 9 * a_edge, scale),
                reference_attention(adj, x, 9 * a_edge, scale), (x, a_edge), tolerance)
    assert_same(aggregate.aggregate_gat(adj, x, a_src, a_dst),
                reference_attention(adj, x, leaky(logits, 0.2), None), (x, a_src, a_dst), tolerance)
    inputs = (x, a_src, a_dst, a_edge)
    theirs = reference_attention(adj, x, leaky(logits + a_edge, 0.1), scale)
    assert_same(aggregate.aggregate_gat(adj, x, a_src, a_dst, a_edge, 0.1, scale), theirs, inputs, tolerance)
    assert_same(attend_by_scatter(adj, *inputs, 0.1, scale), theirs, inputs, tolerance)


@relaxed
@given(bipartite())
def test_attention(case: tuple[Adjacency, torch.Generator]) -> None:
    check_attention(*case, heads=2, width=3, dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=str)
def test_attention_beyond_one_thread_and_one_block(dtype: torch.dtype, tolerance: float, threads: int) -> None:
    check_attention(large(), torch.Generator().manual_seed(3), 4, 8, dtype, tolerance)


def test_attention_with_logits_that_overflow_and_masked_edges() -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 1]]), 3, 2)
    inf = float("inf")
    for dtype in (torch.float32, torch.float64):
        x, logits = torch.randn(3, 1, 4, dtype=dtype), torch.tensor([900.0, 899.0, -900.0, -inf, 5.0], dtype=dtype)
        torch.testing.assert_close(aggregate.aggregate_softmax(adj, x, logits.view(-1, 1)),
                                   reference_attention(adj, x, logits.view(-1, 1), None))


def test_a_mask_in_front_of_a_hub_does_not_spoil_it() -> None:
    count = 300  # more than two blocks of the kernel; the first is masked entirely
    adj = Adjacency.from_edge_index(torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)]), count, 1)
    x, logits = normal(count, 1, 2), torch.linspace(-1, 1, count, dtype=torch.float64).view(-1, 1)
    logits[:130] = -float("inf")
    torch.testing.assert_close(aggregate.aggregate_softmax(adj, x, logits), reference_attention(adj, x, logits, None))


# --- all of them -----------------------------------------------------------------------------------------------------

def test_a_hub_of_a_hundred_thousand_edges(threads: int) -> None:
    edges = 100_000
    adj = Adjacency.from_edge_index(torch.stack([torch.arange(edges) % 50, torch.zeros(edges, dtype=torch.int64)]), 50, 3)
    x, logits, weight = normal(50, 2, 4), normal(edges, 2), normal(edges)
    for op in PLAIN:
        assert_same(getattr(aggregate, f"aggregate_{op}")(adj, x), reference(adj, x, op), (x,), 1e-9)
    assert_same(aggregate.aggregate_sum(adj, x, weight), reference_weighted(adj, x, weight), (x, weight), 1e-9)
    assert_same(aggregate.aggregate_softmax(adj, x, logits), reference_attention(adj, x, logits, None), (x, logits), 1e-9)


@pytest.mark.parametrize(("num_src", "num_dst"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_graphs_without_edges(num_src: int, num_dst: int) -> None:
    adj = Adjacency.from_edge_index(torch.empty(2, 0, dtype=torch.int64), num_src, num_dst)
    for dtype in TOLERANCE:
        x = normal(num_src, 2, 3, dtype=dtype)
        outs = [getattr(aggregate, f"aggregate_{op}")(adj, x) for op in PLAIN]
        outs += [aggregate.aggregate_softmax(adj, x, normal(0, 2, dtype=dtype)),
                 aggregate.aggregate_gat(adj, x, normal(num_src, 2, dtype=dtype), normal(num_dst, 2, dtype=dtype))]
        for out in outs:
            assert out.shape == (num_dst, 2, 3) and not out.any()
            grad, = torch.autograd.grad(out.sum(), x)
            assert grad.shape == x.shape and not grad.any()


def test_rows_need_not_be_contiguous() -> None:
    adj, x = large(), normal(5, 700, 2)
    turned = x.permute(1, 2, 0)
    for op in PLAIN:
        assert_same(getattr(aggregate, f"aggregate_{op}")(adj, turned), reference(adj, turned, op), (x,), 1e-10)
    logits = normal(2, adj.num_edges)
    assert_same(aggregate.aggregate_softmax(adj, turned, logits.t()), reference_attention(adj, turned, logits.t(), None),
                (x, logits), 1e-10)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    adj, x, before = large(), normal(700, 2, 32), torch.get_num_threads()
    logits = normal(adj.num_edges, 2)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = [aggregate.aggregate_sum(adj, x), aggregate.aggregate_max(adj, x),
                   aggregate.aggregate_softmax(adj, x, logits)]
            results.append(out + list(torch.autograd.grad(sum(part.square().sum() for part in out), (x, logits))))
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
        ("`out` of torch.float32 \\[1, 1, 3\\]", lambda: aggregate.aggregate_sum(adj, x, out=torch.ones(2, 1, 3))),
        ("`logits`", lambda: aggregate.aggregate_softmax(adj, x, torch.ones(2, 2))),
        ("`a_dst` of shape \\[1, 1\\]", lambda: aggregate.aggregate_gat(adj, x, torch.ones(2, 1), torch.ones(2, 1))),
        ("constant `scale`", lambda: aggregate.aggregate_softmax(adj, x, torch.ones(2, 1), normal(2, 1))),
    ]:
        with pytest.raises(GraphError, match=said):
            call()
