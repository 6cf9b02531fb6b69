r"""What a batch holds: blocks, types, attributes, times, links and their negatives."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph
from loader_cases import open_share
from partpar.models import GraphSAGE
from parts import typed_graph
from torch_geometric.data import HeteroData

from partpar import GraphData, models
from partpar.errors import SamplingError
from partpar.sampling import DistLinkNeighborLoader, DistNeighborLoader, blocks


def test_blocks_train_as_whole_batches_do() -> None:
    data = directed_graph()
    batch = next(iter(DistNeighborLoader(data, [4, 3], batch_size=20)))
    for name in ("GraphSAGE", "GIN", "GAT"):
        torch.manual_seed(1)
        theirs = getattr(pyg, name)(8, 6, 2, 4).double()
        ours = getattr(models, name)(8, 6, 2, 4).double()
        ours.load_state_dict(theirs.state_dict(), strict=False)
        for model, edges in ((theirs, batch.edge_index), (ours, blocks(batch))):
            F.cross_entropy(model(batch.x, edges)[: batch.batch_size], batch.y[: batch.batch_size]).backward()
        for (key, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() < 1e-10, key
    with pytest.raises(SamplingError, match="as many hops as layers"):
        blocks(batch, 3)
    with pytest.raises(ValueError, match="a block for each of 3 layers"):
        GraphSAGE(8, 6, 3, 4).double()(batch.x, blocks(batch))


def test_blocks_shrink() -> None:
    batch = next(iter(DistNeighborLoader(directed_graph(), [4, 3], batch_size=10)))
    first, last = blocks(batch)
    assert (first.num_src, last.num_dst) == (batch.num_nodes, 10)
    assert first.num_dst == last.num_src < first.num_src
    assert last.num_edges < first.num_edges == batch.edge_index.size(1)


def _hetero() -> HeteroData:
    data = typed_graph()
    data["reader"].x = torch.empty(0, 3)  # a type without nodes
    return data


def hetero_case(worker: Worker, root: str) -> None:
    data, share = _hetero(), open_share(worker, root)
    with DistNeighborLoader(share, [2, 2], ("paper", None), batch_size=7) as loader:
        for batch in loader:
            assert batch["paper"].batch_size == batch["paper"].input_id.numel()
            assert set(batch.node_types) == set(data.node_types)
            assert set(batch.edge_types) == set(data.edge_types)
            for t in data.node_types:
                assert torch.equal(batch[t].x, data[t].x[batch[t].n_id])
            for t in data.edge_types:
                ends = [batch[end].n_id[batch[t].edge_index[i]] for i, end in ((0, t[0]), (1, t[2]))]
                assert torch.equal(torch.stack(ends), data[t].edge_index[:, batch[t].e_id])
                assert torch.equal(batch[t].weight, data[t].weight[batch[t].e_id])
    kind = ("author", "writes", "paper")
    links, times = data[kind].edge_index, data[kind].time
    options = {"edge_label_time": times, "time_attr": "time", "neg_sampling": "binary", "batch_size": 9}
    with DistLinkNeighborLoader(share, [3, 2], (kind, links), **options) as loader:
        for batch in loader:
            n = batch[kind].input_id.numel()
            index = batch[kind].edge_label_index
            found = torch.stack([batch[end].n_id[index[i]] for i, end in ((0, kind[0]), (1, kind[2]))])
            assert torch.equal(found[:, :n], links[:, batch[kind].input_id])
            assert batch[kind].edge_label.tolist() == [1.0] * n + [0.0] * n
            limit = times[batch[kind].input_id]
            for t in data.edge_types:
                into = batch[t[2]].batch[batch[t].edge_index[1]]
                assert bool((batch[t].time <= limit[into]).all()), "nothing later than its link"


def test_types_attributes_and_times(gang: Gang, tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(_hetero())
    for world_size in (1, 3):
        graph.partition_graph(tmp_path, world_size, algorithm="random")
        gang.run(hetero_case, world_size, str(tmp_path))


def test_links_and_their_negatives() -> None:
    data = directed_graph()
    loader = DistLinkNeighborLoader(data, [2], data.edge_index, data.y[:1].repeat(275), neg_sampling_ratio=1.0, batch_size=50)
    for batch in loader:
        n = batch.input_id.numel()
        assert torch.equal(batch.n_id[batch.edge_label_index[:, :n]], data.edge_index[:, batch.input_id])
        assert bool((batch.edge_label[:n] >= 1).all())
        assert bool((batch.edge_label[n:] == 0).all())
    triplets = DistLinkNeighborLoader(data, [2], neg_sampling={"mode": "triplet", "amount": 3}, batch_size=50)
    for batch in triplets:
        n = batch.input_id.numel()
        ends = torch.stack([batch.n_id[batch.src_index], batch.n_id[batch.dst_pos_index]])
        assert torch.equal(ends, data.edge_index[:, batch.input_id])
        assert batch.dst_neg_index.shape == (n, 3)


def test_transform_runs_where_it_is_told() -> None:
    data, main = directed_graph(), threading.get_ident()
    for here, per_worker in ((True, False), (False, True)):
        names = []
        loader = DistNeighborLoader(
            data, [2], batch_size=20, transform=lambda b, n=names: n.append(threading.get_ident()) or b,
            filter_per_worker=per_worker,
        )  # fmt: skip
        assert len(list(loader)) == len(names) == 3
        assert all((name == main) == here for name in names)
