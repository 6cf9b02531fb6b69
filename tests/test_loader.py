r"""Batches of loaders: what they hold, whose seeds they are, and that nothing but seed, epoch, number and seeds decides
them."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
import torch_geometric.transforms as T
from gang import Gang, Worker, launch
from graphs import directed_graph, npz_path
from partpar.models import GraphSAGE
from parts import typed_graph
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import k_hop_subgraph

from partpar import GraphData, datasets, models, training
from partpar.errors import SamplingError, StaleIteratorError
from partpar.sampling import DistLinkNeighborLoader, DistNeighborLoader, blocks
from partpar.sampling.inputs import Steps, share_out
from partpar.serving import agent

SEEDS = torch.tensor([7, 0, 44, 50, 21, 3, 58, 12, 33, 9, 51, 54])  # among them sinks, sources and isolated nodes


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> str:
    r"""The odd graph in 1 to 4 parts, and in two of which one is empty."""
    root = tmp_path_factory.mktemp("loader")
    graph = GraphData.from_pyg_data(directed_graph())
    for num_parts in (1, 2, 3, 4):
        graph.partition_graph(root, num_parts, algorithm="random")
    empty = {"assignment": torch.zeros(60, dtype=torch.int64)}
    graph.partition_graph(root / "empty", 2, algorithm="given", partition_kwargs=empty)
    return str(root)


def open_share(worker: Worker, root: str, algorithm: str = "random") -> GraphData:
    return GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)


def columns(batch: Data) -> dict[str, Tensor]:
    r"""All that a batch holds, by name."""
    return {name: value for name, value in batch.to_dict().items() if isinstance(value, Tensor)}


def same(one: Data, other: Data) -> None:
    a, b = columns(one), columns(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    for name in ("num_sampled_nodes", "num_sampled_edges", "batch_size"):
        assert one.get(name) == other.get(name)


def check_rows(batch: Data, data: Data) -> None:
    r"""Every row in a batch is the one that belongs to its node or edge."""
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
    for name in ("x", "y", "train_mask"):
        assert torch.equal(batch[name], data[name][batch.n_id])
    for name in ("edge_attr", "edge_weight"):
        assert torch.equal(batch[name], data[name][batch.e_id])


# --- the same batches -----------------------------------------------------------------------------------------------


def may_have_children() -> None:
    r"""Workers of the gang are daemons, which the standard library lets have no children; users' workers are none."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


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
@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_do_not_depend_on_processes(parts: str, world_size: int) -> None:
    data = directed_graph()
    expected = list(_second_epoch(DistNeighborLoader(data, [3, 2], SEEDS, batch_size=5, shuffle=True, seed=5)))
    for persistent in (False, True):
        options = {"num_workers": 2, "persistent_workers": persistent}
        for made in launch(batches_case, world_size, parts, options):
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


# --- what a batch holds ---------------------------------------------------------------------------------------------


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


# --- seeds and steps ------------------------------------------------------------------------------------------------


def test_steps_lose_no_seed_unless_asked() -> None:
    counts = [10, 3, 0]
    for rank, count in enumerate(counts):
        split = Steps.agree(counts, rank, 4, False, "split")
        assert split.steps == 3
        seen = [i for k in range(3) for i in split.bounds(k)]
        assert sorted(seen) == list(range(count))
        assert Steps.agree(counts, rank, 4, True, "split").steps == 0
        assert Steps.agree(counts, rank, 4, False, "stop").steps == 0
    padded = Steps.agree([10, 3], 1, 4, False, "pad")
    assert [[i % 3 for i in padded.bounds(k)] for k in range(3)] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    few = Steps.agree([12, 2], 1, 4, False, "split")
    assert [len(few.bounds(k)) for k in range(3)] == [1, 1, 1]


def test_common_seeds_are_shared_out_local_ones_first() -> None:
    owners = torch.tensor([0] * 9 + [1] * 3)
    ranks = share_out(owners, 2, 2)
    assert torch.bincount(ranks).tolist() == [6, 6]
    assert ranks[9:].tolist() == [1, 1, 1]
    assert torch.bincount(share_out(owners, 2, 4)).tolist() == [3, 3, 3, 3]
    assert share_out(owners[:0], 2, 4).numel() == 0


def seeds_case(worker: Worker, root: str) -> list[list[int]]:
    share, data = open_share(worker, root), directed_graph()
    out = []
    inputs: tuple[tuple[Any, dict[str, Any]], ...] = (
        (data.train_mask, {}),
        (data.train_mask.nonzero().flatten(), {"seeds": "shared"}),
        (share.node()["train_mask"], {}),
        (None, {}),
    )
    for given, more in inputs:
        with DistNeighborLoader(share, [2], given, batch_size=8, shuffle=True, **more) as loader:
            out.append(torch.cat([b.n_id[: b.batch_size] for b in loader]).tolist())
    return out


def test_masks_are_shared_out_and_every_seed_comes_once(gang: Gang, parts: str) -> None:
    data = directed_graph()
    train = data.train_mask.nonzero().flatten().tolist()
    told = gang.run(seeds_case, 2, parts)
    for k, expected in enumerate((train, train, train, list(range(60)))):
        assert sorted(i for rank in told for i in rank[k]) == expected
    assert abs(len(told[0][0]) - len(told[1][0])) <= 1


def test_what_does_not_fit_is_refused() -> None:
    data = directed_graph()
    for arguments, said in (
        ({"input_nodes": data.x[:, 0]}, "integer ids or a bool mask"),
        ({"input_nodes": torch.ones(7, dtype=torch.bool)}, "mask of all 60 nodes"),
        ({"input_nodes": ("other", None)}, "expected a node type of"),
        ({"input_nodes": torch.tensor([60])}, "60"),
        ({"input_time": torch.arange(60)}, "expected time_attr as well"),
        ({"uneven": "fair"}, "expected one of split, pad, stop"),
        ({"batch_size": 0}, "at least 1"),
        ({"attributes": ["z"]}, r"found \['z'\]"),
        ({"seeds": "mine"}, "expected 'own'"),
    ):
        with pytest.raises(ValueError, match=said):
            DistNeighborLoader(data, [2], **arguments)
    with pytest.raises(ValueError, match="expected time_attr as well"):
        DistLinkNeighborLoader(data, [2], edge_label_time=torch.arange(275))
    with pytest.raises(ValueError, match="expected a share"):
        DistNeighborLoader("graph", [2])


@pytest.mark.parametrize("given", [10, {("node", "to", "node"): 10}, "10"])
def test_one_fan_out_is_no_list_of_them(given: Any) -> None:
    with pytest.raises(SamplingError, match=r"a number for each hop, such as \[10, 5\], found '?10"):
        DistNeighborLoader(directed_graph(), given)


def wrong_seed_case(worker: Worker, root: str, link: bool) -> None:
    share = open_share(worker, root)
    seeds = torch.tensor([1, 70000 if worker.rank == 1 else 2])
    try:
        if link:
            DistLinkNeighborLoader(share, [2], seeds.view(2, 1))
        else:
            DistNeighborLoader(share, [2], seeds)
    finally:  # the service outlives the refusal: the next loader takes it, and ends it
        with DistNeighborLoader(share, [2], batch_size=8) as loader:
            assert len(list(loader)) == len(loader)
        assert not agent.is_running()


@pytest.mark.parametrize("link", [False, True])
def test_a_wrong_seed_of_one_rank_raises_on_all(gang: Gang, parts: str, link: bool) -> None:
    for outcome, kind in zip(gang.run_expecting_errors(wrong_seed_case, 2, parts, link, timeout=20), ("SamplingError", "IdError"), strict=True):
        assert outcome is not None
        assert outcome[0] == kind
        assert "rank 1: expected raw ids of 'node', found 1 that no part has, the first 70000" in outcome[1]


@pytest.mark.parametrize("concurrency", [0, 2])
def test_an_iterator_that_another_replaced_says_so(concurrency: int) -> None:
    loader = DistNeighborLoader(directed_graph(), [2], SEEDS, batch_size=4, concurrency=concurrency)
    old = iter(loader)
    next(old)
    assert len(list(loader)) == 3
    for _ in range(2):
        with pytest.raises(StaleIteratorError, match="iterated anew.*epoch 0, of which 1 batches were read"):
            next(old)
    old = iter(loader)
    assert len(list(old)) == len(list(loader)) == 3
    assert list(old) == [], "one that was read to its end stays at it"
    old = iter(loader)
    next(old)
    loader.close()
    assert list(old) == []


def ids_case(worker: Worker, root: str) -> None:
    share = open_share(worker, root)
    with DistNeighborLoader(share, [2], batch_size=8) as loader:
        for batch in loader:
            ids, low = loader.ids_of(batch.n_id), int(share.offsets("node")[worker.rank])
            here = (ids >= low) & (ids < low + share.num_owned())
            assert here[: batch.batch_size].all(), "seeds are a worker's own nodes"
            assert torch.equal(share.node()["raw_ids"][ids[here] - low], batch.n_id[here])
        with pytest.raises(ValueError, match="60"):
            loader.ids_of(torch.tensor([60]))


def test_ids_of_nodes_in_a_batch_are_found(gang: Gang, parts: str) -> None:
    gang.run(ids_case, 2, parts)


def unequal_case(worker: Worker, root: str) -> tuple[int, int]:
    r"""Two loaders, used in turn under DDP, on ranks whose seeds are 20 and 5."""
    share = open_share(worker, root)
    own = share.node()["raw_ids"]
    train = DistNeighborLoader(share, [2, 2], own[: 20 if worker.rank == 0 else 5], batch_size=4, shuffle=True)
    test = DistNeighborLoader(share, [2, 2], own[:6], batch_size=1)
    model = DistributedDataParallel(GraphSAGE(8, 4, 2, 4).double(), process_group=worker.group)
    steps = [0, 0]
    for _ in range(2):
        for k, loader in enumerate((train, test)):
            for batch in loader:
                out = model(batch.x, blocks(batch))
                F.cross_entropy(out, batch.y[: batch.batch_size]).backward()
                steps[k] += 1
    test.close()
    train.close()
    return steps[0], steps[1]


def test_unequal_ranks_take_equal_steps(gang: Gang, parts: str) -> None:
    assert gang.run(unequal_case, 2, parts) == [(10, 12), (10, 12)]


# --- errors and ends ------------------------------------------------------------------------------------------------


def _fail(batch: Data) -> Data:
    if 3 in batch.input_id:
        raise ArithmeticError("of the transform")
    return batch


@pytest.mark.parametrize("concurrency", [0, 2])
def test_an_error_comes_where_its_batch_would(concurrency: int) -> None:
    loader = DistNeighborLoader(
        directed_graph(), [2], batch_size=1, transform=_fail, filter_per_worker=True, concurrency=concurrency
    )
    seen = 0
    with pytest.raises(ArithmeticError, match="of the transform"):
        for _ in loader:
            seen += 1
    assert seen == 3
    assert _threads() == []


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("partpar-loader")]


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def test_dropped_loaders_leave_nothing() -> None:
    data = directed_graph()

    def half(count: int) -> None:
        for _ in range(count):
            for number, _ in enumerate(DistNeighborLoader(data, [2], batch_size=5, concurrency=2)):
                if number == 3:
                    break

    half(2)
    before = threading.active_count(), _entries("/proc/self/fd")
    half(10)
    assert (threading.active_count(), _entries("/proc/self/fd")) == before


@pytest.mark.faults
def test_fifty_loaders_with_processes_leave_nothing(parts: str) -> None:
    launch(fifty_case, 2, parts, timeout=280)


def fifty_case(worker: Worker, root: str) -> None:
    import psutil

    may_have_children()
    share, me = open_share(worker, root), psutil.Process()

    def count() -> tuple[int, int, int, int]:
        return me.num_threads(), me.num_fds(), len(me.children(recursive=True)), _entries("/dev/shm")

    def half(count: int, **options: Any) -> None:
        for _ in range(count):
            loader = DistNeighborLoader(share, [2], SEEDS, batch_size=2, **options)
            iterator = iter(loader)
            for _ in range(3):
                next(iterator)
            del iterator, loader

    keep = DistNeighborLoader(share, [2], SEEDS, batch_size=2)  # so that the service stays
    half(2, concurrency=2)
    half(1, num_workers=1)
    time.sleep(1)
    before = count()
    half(46, concurrency=2)
    half(2, num_workers=1)
    time.sleep(1)
    after = count()
    assert all(b <= a + 2 for a, b in zip(before[:3], after[:3], strict=True)), (before, after)
    keep.close()


@pytest.mark.faults
def test_a_failing_part_raises_in_the_training_loop(parts: str) -> None:
    start = time.monotonic()
    outcomes = launch(failing_case, 2, parts, check=False, timeout=60)
    assert time.monotonic() - start < 60
    kind, message = outcomes[0].error
    assert kind in ("RemoteError", "SamplingError")
    assert "part 1" in message


def failing_case(worker: Worker, root: str) -> None:
    share = open_share(worker, root)
    loader = DistNeighborLoader(share, [3, 3], None, batch_size=8)
    if worker.rank == 1:
        share.csc = None  # type: ignore[assignment, method-assign]
        from partpar.serving import hop

        hop._kept.clear()
        time.sleep(5)
        return
    for _ in range(5):
        list(loader)


@pytest.mark.faults
def test_a_dead_part_raises_in_the_training_loop(parts: str) -> None:
    start = time.monotonic()
    outcomes = launch(dying_case, 2, parts, check=False, timeout=60)
    assert time.monotonic() - start < 60
    kind, message = outcomes[0].error
    assert kind == "PeerLostError"
    assert "part 1" in message


def dying_case(worker: Worker, root: str) -> None:
    share = open_share(worker, root)
    loader = DistNeighborLoader(share, [3, 3], None, batch_size=8)
    list(loader)
    if worker.rank == 1:
        os._exit(3)
    while True:
        list(loader)


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
