r"""Edges grouped by destination, their transpose and their halves."""

import pytest
import torch
from bipartite import assert_same, bipartite, large, normal, reference_weighted, relaxed
from hypothesis import given
from hypothesis import strategies as st

from partpar.errors import GraphError
from partpar.kernels import aggregate
from partpar.kernels.adjacency import Adjacency


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


def test_it_is_told_by_its_sizes() -> None:
    adj = Adjacency.from_edge_index(torch.tensor([[0, 2], [1, 1]]), 3, 2)
    assert repr(adj) == "Adjacency(3 sources, 2 destinations, 2 edges)"


def test_torch_csr_serves_pyg() -> None:
    adj = large()
    matrix = adj.torch_csr(torch.float64)
    assert matrix.shape == (500, 700) and matrix.col_indices().dtype == torch.int64
    x = normal(700, 4)
    torch.testing.assert_close(matrix @ x, aggregate.aggregate_sum(adj, x))


@pytest.mark.parametrize(
    ("indptr", "indices", "said"),
    [
        ([0, 2], [0, 1], "found \\[2\\]"),
        ([0, 2, 1], [0], "falling"),
        ([0, 1, 2], [0, 3], "found 0..3"),
        ([0, 1, 2], [-1, 0], "found -1..0"),
        ([1, 1, 2], [0, 0], "from 1"),
        ([0, 1, 3], [0, 0], "to 3"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(indptr: list[int], indices: list[int], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        Adjacency(torch.tensor(indptr), torch.tensor(indices), 3, 2)


def test_ends_out_of_bounds_are_refused() -> None:
    with pytest.raises(GraphError, match="sources in 0..1, found 0..2"):
        Adjacency.from_edge_index(torch.tensor([[0, 2], [0, 0]]), 2, 1)
    with pytest.raises(GraphError, match="destinations in 0..0, found 0..1"):
        Adjacency.from_edge_index(torch.tensor([[0, 1], [0, 1]]), 2, 1)
