r"""Attention over in-edges against PyG's softmax and scatter."""

import pytest
import torch
from bipartite import assert_same, bipartite, large, normal, reference_attention, relaxed
from hypothesis import given

from partpar.kernels import aggregate
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.softmax import attend_by_scatter


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check_attention(
    adj: Adjacency, generator: torch.Generator, heads: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    x, a_src = (
        normal(adj.num_src, *more, generator=generator, dtype=dtype) for more in ((heads, width), (heads,))
    )
    a_dst, a_edge = (
        normal(count, heads, generator=generator, dtype=dtype) for count in (adj.num_dst, adj.num_edges)
    )
    scale = (torch.rand(adj.num_edges, heads, generator=generator, dtype=torch.float64) * 2).floor().to(
        dtype
    ) * 2
    logits = a_src[adj.indices.long()] + a_dst[adj.destinations.long()]
    leaky = torch.nn.functional.leaky_relu
    assert_same(
        aggregate.aggregate_softmax(adj, x, 9 * a_edge, scale),
        reference_attention(adj, x, 9 * a_edge, scale),
        (x, a_edge),
        tolerance,
    )
    assert_same(
        aggregate.aggregate_gat(adj, x, a_src, a_dst),
        reference_attention(adj, x, leaky(logits, 0.2), None),
        (x, a_src, a_dst),
        tolerance,
    )
    inputs = (x, a_src, a_dst, a_edge)
    theirs = reference_attention(adj, x, leaky(logits + a_edge, 0.1), scale)
    assert_same(aggregate.aggregate_gat(adj, x, a_src, a_dst, a_edge, 0.1, scale), theirs, inputs, tolerance)
    assert_same(attend_by_scatter(adj, *inputs, 0.1, scale), theirs, inputs, tolerance)


@relaxed
@given(bipartite())
def test_attention(case: tuple[Adjacency, torch.Generator]) -> None:
    check_attention(*case, heads=2, width=3, dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=str)
def test_attention_beyond_one_thread_and_one_block(
    dtype: torch.dtype, tolerance: float, threads: int
) -> None:
    check_attention(large(), torch.Generator().manual_seed(3), 4, 8, dtype, tolerance)


def test_attention_with_logits_that_overflow_and_masked_edges() -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 1]]), 3, 2)
    inf = float("inf")
    for dtype in (torch.float32, torch.float64):
        x, logits = (
            torch.randn(3, 1, 4, dtype=dtype),
            torch.tensor([900.0, 899.0, -900.0, -inf, 5.0], dtype=dtype),
        )
        torch.testing.assert_close(
            aggregate.aggregate_softmax(adj, x, logits.view(-1, 1)),
            reference_attention(adj, x, logits.view(-1, 1), None),
        )


def test_a_mask_in_front_of_a_hub_does_not_spoil_it() -> None:
    count = 300  # more than two blocks of the kernel; the first is masked entirely
    adj = Adjacency.from_edge_index(
        torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)]), count, 1
    )
    x, logits = normal(count, 1, 2), torch.linspace(-1, 1, count, dtype=torch.float64).view(-1, 1)
    logits[:130] = -float("inf")
    torch.testing.assert_close(
        aggregate.aggregate_softmax(adj, x, logits), reference_attention(adj, x, logits, None)
    )
