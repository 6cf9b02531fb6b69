r"""The generated graph must hold the oddities that the exactness tests rely on."""

from __future__ import annotations

import pytest
import torch
from graphs import directed_graph, load_npz_graph
from torch_geometric.utils import contains_isolated_nodes, contains_self_loops, degree, is_undirected


def test_generated_graph_holds_every_oddity() -> None:
    data = directed_graph(seed=3)
    src, dst = data.edge_index
    out_degree, in_degree = degree(src, data.num_nodes), degree(dst, data.num_nodes)
    assert int(((out_degree == 0) & (in_degree > 0)).sum()) >= 3  # sinks
    assert int(((out_degree > 0) & (in_degree == 0)).sum()) >= 3  # sources
    assert int(((out_degree == 0) & (in_degree == 0)).sum()) >= 3
    assert contains_isolated_nodes(data.edge_index, data.num_nodes)
    assert contains_self_loops(data.edge_index)
    assert not is_undirected(data.edge_index)
    assert torch.unique(data.edge_index, dim=1).size(1) <= data.num_edges - 10
    assert torch.equal(
        data.train_mask.int() + data.val_mask.int() + data.test_mask.int(), torch.ones(60).int()
    )
    assert data.validate()


def test_generated_graph_depends_on_its_seed_only() -> None:
    assert torch.equal(directed_graph(1).x, directed_graph(1).x)
    assert not torch.equal(directed_graph(1).edge_index, directed_graph(2).edge_index)


@pytest.mark.parametrize(
    "name, nodes, edges, features", [("cora", 2708, 10556, 1433), ("tolokers", 11758, 1038000, 10)]
)
def test_real_graphs_have_the_known_counts(name: str, nodes: int, edges: int, features: int) -> None:
    data = load_npz_graph(name)
    assert (data.num_nodes, data.num_edges, data.x.size(1)) == (nodes, edges, features)
    if name == "cora":
        assert (int(data.x.count_nonzero()), int(data.train_mask.sum())) == (49216, 140)
