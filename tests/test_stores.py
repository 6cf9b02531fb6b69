r"""The stores: PyG's interfaces over a share, or over tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gang import Gang, Worker
from graphs import directed_graph
from test_serving import EDGE, assignment, cut, typed_graph
from torch import Tensor
from torch_geometric.testing import get_random_edge_index
from torch_geometric.utils import sort_edge_index

from partpar.errors import GraphError, IdError, MissingPartitionError
from partpar.serving import agent, start_service
from partpar.serving.book import RangeBook
from partpar.serving.feature_store import LocalFeatureStore
from partpar.serving.graph_store import LocalGraphStore
from partpar.serving.handmade import share_of
from partpar.serving.hop import answer_hop
from partpar.serving.messages import HopRequest


def test_edges_and_their_ids_by_attribute():
    store = LocalGraphStore()
    edge_index, edge_id = get_random_edge_index(100, 100, 300), torch.randperm(300)
    attr = {"edge_type": None, "layout": "coo", "size": (100, 100)}
    store.put_edge_index(edge_index, **attr)
    store.put_edge_id(edge_id, **attr)
    (edge_attr,) = store.get_all_edge_attrs()
    assert torch.equal(store.get_edge_index(edge_attr), edge_index)
    assert torch.equal(store.get_edge_id(edge_attr), edge_id)
    assert store.remove_edge_index(edge_attr) and store.remove_edge_id(edge_attr)
    assert not store.get_all_edge_attrs() and not store.remove_edge_id(edge_attr)


@pytest.mark.parametrize("edge_type", [None, ("v", "to", "w")])
def test_edges_of_tensors_are_sorted_by_destination(edge_type):
    edge_index, edge_id = get_random_edge_index(100, 100, 300), torch.randperm(300)
    if edge_type is None:
        store = LocalGraphStore.from_data(edge_id, edge_index, num_nodes=100)
    else:
        store = LocalGraphStore.from_hetero_data(
            {edge_type: edge_id}, {edge_type: edge_index}, num_nodes_dict={"v": 100, "w": 100}
        )
    (attr,) = store.get_all_edge_attrs()
    assert attr.edge_type == edge_type and attr.layout.value == "coo"
    assert attr.is_sorted and attr.size == (100, 100)
    expected = sort_edge_index(edge_index, edge_id, sort_by_row=False)
    assert torch.equal(store.get_edge_index(attr), expected[0])
    assert torch.equal(store.get_edge_id(edge_type=edge_type, layout="coo"), expected[1])


def test_rows_by_raw_ids():
    feat = torch.arange(27.0).view(9, 3)
    ids = torch.tensor([1, 2, 3, 5, 8, 4])
    store = LocalFeatureStore()
    store.put_global_id(ids, group_name="paper")
    store.put_tensor(feat[ids], group_name="paper", attr_name="feat")
    index = torch.tensor([3, 8, 4, 3])
    out = store.get_tensor_from_global_id(group_name="paper", attr_name="feat", index=index)
    assert torch.equal(out, feat[index])
    (attr,) = store.get_all_tensor_attrs()
    assert (attr.group_name, attr.attr_name, attr.index) == ("paper", "feat", None)
    assert store.get_tensor_size(attr) == (6, 3)
    with pytest.raises(IdError, match="the first 7"):
        store.get_tensor_from_global_id(group_name="paper", attr_name="feat", index=torch.tensor([1, 7]))
    with pytest.raises(GraphError, match="put_global_id"):
        store.get_tensor_from_global_id(group_name="author", attr_name="feat", index=index)


def test_rows_of_tensors():
    ids, x, y = torch.randperm(6), torch.randn(6, 32), torch.randint(0, 2, (6,))
    edge_id, edge_attr = torch.randperm(12), torch.randn(12, 16)
    store = LocalFeatureStore.from_data(ids, x, y, edge_id, edge_attr)
    found = [(a.group_name, a.attr_name) for a in store.get_all_tensor_attrs()]
    assert found == [(None, "x"), (None, "y"), ((None, None), "edge_attr")]
    assert torch.equal(store.get_global_id(group_name=None), ids)
    assert torch.equal(store.get_tensor(group_name=None, attr_name="x"), x)
    assert store.has_edge_attr()
    edge_type = ("paper", "to", "paper")
    typed = LocalFeatureStore.from_hetero_data(
        {"paper": ids}, {"paper": x}, {"paper": y}, {edge_type: edge_id}, {edge_type: edge_attr}
    )
    found = [(a.group_name, a.attr_name) for a in typed.get_all_tensor_attrs()]
    assert found == [("paper", "x"), ("paper", "y"), (edge_type, "edge_attr")]
    assert torch.equal(typed.get_global_id(group_name=edge_type), edge_id)
    with pytest.raises(ValueError, match="edge_id"):
        LocalFeatureStore.from_data(ids, edge_attr=edge_attr)
    with pytest.raises(ValueError, match="edge_id"):
        LocalFeatureStore.from_hetero_data({"paper": ids}, edge_attr_dict={edge_type: edge_attr})


def test_range_book_reads_like_a_tensor():
    book = RangeBook(torch.tensor([0, 3, 3, 10]))
    assert torch.equal(book[torch.arange(10)], torch.tensor([0] * 3 + [2] * 7)) and len(book) == 10


@pytest.mark.parametrize("typed", [False, True])
def test_stores_of_a_partition(tmp_path, typed):
    data = typed_graph() if typed else directed_graph()
    cut(tmp_path, 2, data)
    graphs = [LocalGraphStore.from_partition(tmp_path, p) for p in range(2)]
    features = [LocalFeatureStore.from_partition(tmp_path / "given_2", p) for p in range(2)]
    assert graphs[0].meta["is_hetero"] is typed and graphs[1].partition_idx == 1
    edge_types = data.edge_types if typed else [None]
    for edge_type in edge_types:
        store = data[edge_type] if typed else data
        got = {}
        for graph, feature in zip(graphs, features, strict=True):
            edge_index = graph.get_edge_index(edge_type=edge_type, layout="coo")
            edge_id = graph.get_edge_id(edge_type=edge_type, layout="coo")
            assert torch.equal(edge_index, store.edge_index[:, edge_id])
            assert bool((edge_index[1].diff() >= 0).all()), "sorted, as the attribute says"
            group = edge_type if typed else (None, None)
            rows = feature.get_tensor_from_global_id(group_name=group, attr_name="edge_attr", index=edge_id)
            assert torch.equal(rows, store.edge_attr[edge_id])
            node_type = edge_type[2] if typed else None
            assert bool((graph.get_partition_ids_from_nids(edge_index[1], node_type) == graph.partition_idx).all())
            got.update(dict.fromkeys(edge_id.tolist()))
        assert len(got) == store.edge_index.size(1)
    with pytest.raises(MissingPartitionError, match="found none"):
        LocalGraphStore.from_partition(tmp_path / "nowhere", 0)
    with pytest.raises(MissingPartitionError, match="from 0 to 1"):
        LocalGraphStore.from_partition(tmp_path, 2)


def case_lookup(worker: Worker, root: Path, typed: bool) -> None:
    graph = LocalGraphStore.from_partition(root, worker.rank)
    feature = LocalFeatureStore.from_share(graph.share)
    data = typed_graph() if typed else directed_graph()
    with start_service(graph.share, timeout=20) as service:
        graph.attach(service)
        feature.attach(service)
        for kind in [*data.node_types, *data.edge_types] if typed else [None, EDGE]:
            is_node = kind is None or isinstance(kind, str)
            store = data[kind] if typed else data
            expected = store.x if is_node else store.edge_attr
            index = torch.randint(max(expected.size(0), 1), (50 if expected.size(0) else 0,))
            rows = feature.lookup_features(index, is_node, kind if typed else None)
            assert torch.equal(rows.wait(), expected[index])
        nodes = torch.arange(40 if typed else 60)
        parts = graph.get_partition_ids_from_nids(nodes, "a" if typed else None)
        assert torch.equal(parts, assignment(len(nodes), 2))
        eids = torch.arange(90 if typed else 275)
        edge_index = (data["b", "rev", "a"] if typed else data).edge_index
        parts_of_edges = graph.get_partition_ids_from_eids(eids, ("b", "rev", "a") if typed else None)
        assert torch.equal(parts_of_edges, parts[edge_index[1]])
        torch.distributed.barrier()
        if worker.rank == 0:
            feature.put_features(nodes, -(data["a"].x if typed else data.x), True, "a" if typed else None)
        torch.distributed.barrier()
        changed = feature.lookup_features(nodes, True, "a" if typed else None).wait()
        assert torch.equal(changed, -(data["a"].x if typed else data.x))
        torch.distributed.barrier()


@pytest.mark.parametrize("typed", [False, True])
def test_rows_of_all_parts_are_looked_up(gang: Gang, tmp_path, typed):
    cut(tmp_path, 2, typed_graph() if typed else None)
    gang.run(case_lookup, 2, tmp_path, typed)


class Names:
    def get_to_worker(self, partition_idx: int) -> str:
        return f"worker-{partition_idx}"


def case_router(worker: Worker) -> None:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(256) + 256 * worker.rank
    store = LocalFeatureStore.from_data(ids.flip(0), x[ids.flip(0)])
    store.num_partitions, store.partition_idx = 2, worker.rank
    store.node_feat_pb = torch.arange(512) // 256
    agent.start_in_default_group(20, 4)
    store.set_rpc_router(Names())
    torch.distributed.barrier()
    for index in (torch.randint(512, (100,)), torch.arange(256), torch.arange(256, 512), torch.arange(0)):
        assert torch.equal(store.lookup_features(index).wait(), x[index])
    torch.distributed.barrier()
    if worker.rank == 1:
        store.put_features(torch.tensor([3, 400]), torch.zeros(2, 16))
    torch.distributed.barrier()
    assert not bool(store.lookup_features(torch.tensor([400, 3])).wait().any())
    agent.stop()


def test_rows_of_tensors_are_looked_up_by_a_partition_book(gang: Gang):
    gang.run(case_router, 2)


def stores_of_tensors(rank: int) -> tuple[LocalFeatureStore, LocalGraphStore, Tensor]:
    r"""Part of a directed graph whose edges into the other part's nodes are given too."""
    data = directed_graph()
    parts = assignment(60, 2)
    row, col = data.edge_index
    mine = ((parts[col] == rank) | (parts[row] == rank)).nonzero().flatten()
    nodes = torch.cat([(parts == rank).nonzero().flatten(), data.edge_index[:, mine].flatten()]).unique()
    graph = LocalGraphStore.from_data(mine, data.edge_index[:, mine], num_nodes=60)
    graph.node_pb, graph.num_partitions, graph.partition_idx = parts, 2, rank
    feature = LocalFeatureStore.from_data(nodes, data.x[nodes], data.y[nodes], mine, data.edge_attr[mine])
    return feature, graph, parts


@pytest.mark.parametrize("rank", [0, 1])
def test_stores_of_tensors_are_shares(tmp_path, rank):
    from partpar import GraphData

    feature, graph, _ = stores_of_tensors(rank)
    share = share_of(feature, graph)
    cut(tmp_path, 2)
    expected = GraphData.load_partition(tmp_path, rank, 2, "given")
    assert torch.equal(share.offsets(), expected.offsets())
    for side in ("dst", "src"):
        for name in ("ids", "raw_ids"):
            assert torch.equal(share.node("node", side)[name], expected.node("node", side)[name])
    for got, wanted in zip(share.csc(), expected.csc(), strict=True):
        assert torch.equal(got, wanted)
    for name in ("raw_ids", "edge_attr"):
        assert torch.equal(share.edge()[name], expected.edge()[name])
    for name in ("x", "y"):
        assert torch.equal(share.node()[name], expected.node()[name])
    request = HopRequest(EDGE, share.node()["ids"], 2, 5)
    assert torch.equal(answer_hop(share, request).raw_ids, answer_hop(expected, request).raw_ids)
