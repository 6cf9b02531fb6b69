r"""Nothing but seed, epoch, number and seeds decides a batch; all neighbours are the neighbourhood; and training on batches
learns by two workers as by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
import torch_geometric.transforms as T
from gang import Gang, Worker, launch
from graphs import directed_graph, npz_path
from loader_cases import SEEDS, check_rows, may_have_children, open_share, parts, same
from partpar.models import GraphSAGE
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import k_hop_subgraph

from partpar import GraphData, datasets, training
from partpar.sampling import DistNeighborLoader, blocks

assert parts  # the fixture


# --- the same batches -----------------------------------------------------------------------------------------------


def batches_case(worker: Worker, root: str, options: dict[str, Any]) -> list[Data]:
    if options.get("num_workers"):
        may_have_children()
    share = open_share(worker, root)
    with DistNeighborLoader(share, [3, 2], SEEDS, batch_size=5, shuffle=True, seed=5, **options) as loader:
        list(loader)
        made = list(loader)  # of the second epoch
    data = directed_graph()
    for batch in made:
        check_rows(batch, data)
    return made


def test_batches_do_not_depend_on_parts_or_threads(gang: Gang, parts: str) -> None:
    data = directed_graph()
    expected = list(_second_epoch(DistNeighborLoader(data, [3, 2], SEEDS, batch_size=5, shuffle=True, seed=5)))
    assert sorted(torch.cat([b.n_id[: b.batch_size] for b in expected]).tolist()) == sorted(SEEDS.tolist())
    for world_size, options in ((1, {"concurrency": 3}), (2, {"concurrency": 0}), (4, {"concurrency": 2})):
        for made in gang.run(batches_case, world_size, parts, options):
            for one, other in zip(made, expected, strict=True):
                same(one, other)


@pytest.mark.soak
@pytest.mark.parametrize(("world_size", "persistent"), [(2, True), (3, False)])
def test_batches_do_not_depend_on_processes(parts: str, world_size: int, persistent: bool) -> None:
    data = directed_graph()
    expected = list(_second_epoch(DistNeighborLoader(data, [3, 2], SEEDS, batch_size=5, shuffle=True, seed=5)))
    for made in launch(batches_case, world_size, parts, {"num_workers": 2, "persistent_workers": persistent}):
        for one, other in zip(made, expected, strict=True):
            same(one, other)


def _second_epoch(loader: DistNeighborLoader) -> Any:
    loader.set_epoch(1)
    return loader


def test_epochs_and_seeds_differ() -> None:
    data = directed_graph()
    loader = DistNeighborLoader(data, [2], batch_size=60, shuffle=True)
    first, second = next(iter(loader)), next(iter(loader))
    assert not torch.equal(first.input_id, second.input_id)
    other = next(iter(DistNeighborLoader(data, [2], batch_size=60, shuffle=True, seed=1)))
    assert not torch.equal(first.input_id, other.input_id)
    again = DistNeighborLoader(data, [2], batch_size=60, shuffle=True)
    same(first, next(iter(again)))


# --- truth ----------------------------------------------------------------------------------------------------------


def truth_case(worker: Worker, root: str, algorithm: str, weights: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Any]]:
    share = open_share(worker, root, algorithm)
    data = directed_graph()
    model = GraphSAGE(8, 6, 2, 4).double()
    model.load_state_dict(weights)
    loader = DistNeighborLoader(share, [-1, -1], batch_size=4)
    out = []
    for batch in loader:
        check_rows(batch, data)
        nodes, _, _, _ = k_hop_subgraph(batch.n_id[: batch.batch_size], 2, data.edge_index, num_nodes=60)
        assert sorted(batch.n_id.tolist()) == nodes.tolist()
        inner, _, _, _ = k_hop_subgraph(batch.n_id[: batch.batch_size], 1, data.edge_index, num_nodes=60)
        into = torch.isin(data.edge_index[1], inner).nonzero().flatten()
        assert batch.e_id.sort().values.tolist() == into.tolist()
        out.append((batch.n_id[: batch.batch_size], model(batch.x, blocks(batch)).detach(), batch.num_sampled_edges))
    steps = len(loader)
    loader.close()
    assert len(out) == steps
    return out


@pytest.mark.parametrize("name", ["random", "empty"])
def test_all_neighbours_are_the_neighbourhood_and_give_the_full_graphs_logits(
    gang: Gang, parts: str, name: str
) -> None:
    data = directed_graph()
    torch.manual_seed(3)
    reference = pyg.GraphSAGE(8, 6, 2, 4).double()
    expected = reference(data.x, data.edge_index).detach()
    root, algorithm = (f"{parts}/empty", "given") if name == "empty" else (parts, "random")
    for world_size in (2,) if name == "empty" else (1, 4):
        results = gang.run(truth_case, world_size, root, algorithm, reference.state_dict())
        assert len({len(rank) for rank in results}) == 1, "ranks take equally many steps"
        seen = []
        for rank in results:
            for seeds, out, _ in rank:
                assert out.shape == (seeds.numel(), 4)
                assert bool(((out - expected[seeds]).abs() < 1e-10).all())
                seen += seeds.tolist()
        assert sorted(set(seen)) == list(range(60)), "every node is some rank's seed"
        if name == "random":
            assert len(seen) == 60, "each of them once"


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_cora_in_full_neighbourhoods(gang: Gang, tmp_path: Path, world_size: int) -> None:
    data = datasets.from_npz(npz_path("cora"))
    data.x = data.x.double()
    GraphData.from_pyg_data(data).partition_graph(tmp_path, world_size)
    torch.manual_seed(0)
    model = pyg.GraphSAGE(data.x.size(1), 16, 2, 7).double()
    expected = model(data.x, data.edge_index).detach()
    for rank in gang.run(cora_case, world_size, str(tmp_path), model.state_dict(), timeout=200):
        for seeds, out in rank:
            assert (out - expected[seeds]).abs().max() < 1e-10


def cora_case(worker: Worker, root: str, weights: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    share = open_share(worker, root, "metis")
    model = GraphSAGE(share.node()["x"].size(1), 16, 2, 7).double()
    model.load_state_dict(weights)
    with DistNeighborLoader(share, [-1, -1], batch_size=256) as loader:
        return [(b.n_id[: b.batch_size], model(b.x, blocks(b)).detach()) for b in loader]


def dblp_graph() -> HeteroData:
    r"""Authors, papers, terms and venues with edges both ways, few columns and none of its labels."""
    data = T.ToUndirected()(datasets.from_npz(npz_path("dblp_hetero")))
    for node_type in data.node_types:
        store = data[node_type]
        store.x = store.x[:, :16].double() if "x" in store else torch.ones(store.num_nodes, 16, dtype=torch.float64)
    return data


def typed_logits(data: HeteroData) -> Tensor:
    r"""Two layers of GraphSAGE for each edge type, always of the same weights."""
    torch.manual_seed(0)
    x = data.x_dict
    for width in (16, 8):
        convs = {t: pyg.SAGEConv((width, width), 8) for t in sorted(data.edge_types)}
        x = pyg.HeteroConv(convs, aggr="sum").double()(x, data.edge_index_dict)
        x = {t: rows.relu() for t, rows in x.items()}
    return x["author"]


def dblp_case(worker: Worker, root: str) -> list[tuple[Tensor, Tensor]]:
    share = open_share(worker, root, "metis")
    with DistNeighborLoader(share, [-1, -1], ("author", None), batch_size=512, attributes=["x"]) as loader, torch.no_grad():
        sizes = ((b, b["author"].batch_size) for b in loader)
        return [(b["author"].n_id[:n], typed_logits(b)[:n]) for b, n in sizes]


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 3])
def test_dblp_in_full_neighbourhoods(gang: Gang, tmp_path: Path, world_size: int) -> None:
    data = dblp_graph()
    GraphData.from_pyg_data(data).partition_graph(tmp_path, world_size)
    with torch.no_grad():
        expected = typed_logits(data)
    seen = []
    for rank in gang.run(dblp_case, world_size, str(tmp_path), timeout=200):
        for seeds, out in rank:
            assert (out - expected[seeds]).abs().max() < 1e-10
            seen += seeds.tolist()
    assert sorted(seen) == list(range(expected.size(0)))


# --- learning -------------------------------------------------------------------------------------------------------


def learn_case(worker: Worker, root: str, epochs: int, seed: int) -> float:
    share = open_share(worker, root, "metis")
    owned, route = share.node(), share.to_route(worker.group)
    loader = DistNeighborLoader(share, [10, 10], owned["train_mask"], batch_size=256 // worker.world_size, shuffle=True, seed=seed)
    torch.manual_seed(seed)
    inner = GraphSAGE(owned["x"].size(1), 64, 2, 2)
    model = DistributedDataParallel(inner, process_group=worker.group) if worker.world_size > 1 else inner
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        training.train_epoch(
            loader,
            lambda b: (F.cross_entropy(model(b.x, blocks(b)), b.y[: b.batch_size]), b.batch_size),
            optimizer,
            worker.group,
        )
    loader.close()
    logits = training.full_graph_inference(inner, share, route, gather=False)
    rows = owned["raw_ids"].argsort().argsort()
    return training.roc_auc(logits[rows], owned["y"], owned["test_mask"], route)


@pytest.mark.soak
def test_two_workers_learn_tolokers_as_one_does(gang: Gang, tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(datasets.from_npz(npz_path("tolokers")))
    aucs: dict[int, list[float]] = {}
    for workers in (1, 2):
        graph.partition_graph(tmp_path, workers)
        aucs[workers] = [gang.run(learn_case, workers, str(tmp_path), 5, seed, timeout=250)[0] for seed in range(3)]
    spread = max(aucs[1]) - min(aucs[1])
    assert min(aucs[1] + aucs[2]) > 0.65, aucs
    assert abs(sum(aucs[1]) - sum(aucs[2])) / 3 <= max(spread, 0.01), aucs
