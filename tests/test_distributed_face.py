r"""Scripts written for ``torch_geometric.distributed``: their set-up by hand, their arguments, their attributes."""

from __future__ import annotations

import asyncio
import atexit
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from gang import Worker, launch
from graphs import directed_graph
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.datasets import FakeHeteroDataset
from torch_geometric.sampler import EdgeSamplerInput, NodeSamplerInput, SamplerOutput

from partpar import GraphData, distributed
from partpar.distributed import (
    DistContext,
    DistLinkNeighborLoader,
    DistNeighborLoader,
    DistNeighborSampler,
    LocalFeatureStore,
    LocalGraphStore,
    Partitioner,
)
from partpar.distributed.event_loop import ConcurrentEventLoop, to_asyncio_future
from partpar.distributed.partition import load_partition_info
from partpar.distributed.rpc import (
    RPCCallBase,
    RPCRouter,
    global_all_gather,
    global_barrier,
    init_rpc,
    rpc_async,
    rpc_is_initialized,
    rpc_partition_to_workers,
    rpc_register,
    rpc_sync,
    shutdown_rpc,
)
from partpar.distributed.utils import BatchDict, NodeDict, filter_dist_store, remove_duplicates
from partpar.errors import PartitionError, ServiceError
from partpar.sampling import BatchKey, NeighborSampler, Seeds
from partpar.sampling.source import grouped
from partpar.serving import start_service


def context(rank: int, world_size: int) -> DistContext:
    return DistContext(rank=rank, global_rank=rank, world_size=world_size, global_world_size=world_size, group_name="face")


def by_hand(root: str, rank: int) -> tuple[LocalFeatureStore, LocalGraphStore]:
    r"""The set-up of the tutorial, attribute by attribute."""
    features, graph = LocalFeatureStore.from_partition(root, rank), LocalGraphStore.from_partition(root, rank)
    meta, num_parts, part, node_pb, edge_pb = load_partition_info(root, rank)
    graph.partition_idx, graph.num_partitions, graph.node_pb, graph.edge_pb, graph.meta = part, num_parts, node_pb, edge_pb, meta
    features.partition_idx, features.num_partitions, features.meta = part, num_parts, meta
    features.node_feat_pb, features.edge_feat_pb = node_pb, edge_pb
    return features, graph


def sorted_graph() -> Data:
    r"""The odd graph with its edges sorted by destination, as the original wants them."""
    data = directed_graph()
    order = data.edge_index[1].argsort(stable=True)
    for name in ("edge_index", "edge_attr", "edge_weight"):
        data[name] = data[name][:, order] if name == "edge_index" else data[name][order]
    return data


def handmade(rank: int, assignment: Tensor) -> tuple[LocalFeatureStore, LocalGraphStore]:
    r"""Stores of tensors: a book for each node, edges with those of a halo, ids put by hand."""
    data, num_parts = sorted_graph(), int(assignment.max()) + 1
    owned = (assignment == rank).nonzero().flatten()
    known = torch.isin(data.edge_index[1], torch.cat([owned, torch.arange(5)])).nonzero().flatten()
    features = LocalFeatureStore.from_data(owned, data.x[owned], data.y[owned], known, data.edge_attr[known])
    graph = LocalGraphStore.from_data(known, data.edge_index[:, known], num_nodes=60, is_sorted=True)
    graph.node_pb, graph.partition_idx, graph.num_partitions = assignment, rank, num_parts
    features.node_feat_pb, features.partition_idx, features.num_partitions = assignment, rank, num_parts
    graph.meta.update({"num_parts": num_parts})
    features.meta = graph.meta
    return features, graph


def expected_output(seeds: Tensor, disjoint: bool) -> SamplerOutput:
    r"""What one process samples with all neighbours."""
    service = start_service(grouped(GraphData.from_pyg_data(sorted_graph())))
    sampler = NeighborSampler(service, [-1, -1], disjoint=disjoint)
    return sampler.sample_nodes({"node": Seeds(seeds, seeds)}, BatchKey()).to_pyg(True)


# --- in processes that only know an address -------------------------------------------------------------------------


def sampler_process(rank: int, port: int, assignment: Tensor, errors: Any) -> None:
    try:
        _sampler_process(rank, port, assignment)
    except BaseException as error:
        errors.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise


def _sampler_process(rank: int, port: int, assignment: Tensor) -> None:
    num_parts = int(assignment.max()) + 1
    for disjoint in (False, True):
        data, current = handmade(rank, assignment), context(rank, num_parts)
        sampler = DistNeighborSampler(current, data, [-1, -1], shuffle=False, disjoint=disjoint, rpc_worker_names={})
        if not disjoint:
            atexit.register(shutdown_rpc)
        init_rpc(current_ctx=current, rpc_worker_names={}, master_addr="localhost", master_port=port)
        assert rpc_is_initialized()
        sampler.register_sampler_rpc()
        sampler.init_event_loop()
        for seeds in (torch.tensor([7, 44, 3]), torch.tensor([rank * 9 + 1])):  # the second leaves parts without seeds
            inputs = NodeSamplerInput(input_id=None, node=seeds)
            out, expected = sampler.event_loop.run_task(coro=sampler.node_sample(inputs)), expected_output(seeds, disjoint)
            for name in ("node", "row", "col", "edge") + (("batch",) if disjoint else ()):
                assert torch.equal(getattr(out, name), getattr(expected, name)), name
            assert out.num_sampled_nodes == expected.num_sampled_nodes
            assert out.num_sampled_edges == expected.num_sampled_edges
        links = EdgeSamplerInput(input_id=None, row=torch.tensor([1, 6]), col=torch.tensor([2, 7]))
        out = sampler.event_loop.run_task(coro=sampler.edge_sample(links, sampler.node_sample, 60, disjoint))
        ends = torch.tensor([1, 6, 2, 7])
        assert torch.equal(out.node[out.metadata[1]].flatten(), ends)
        out = sampler.sample_from_nodes(NodeSamplerInput(input_id=None, node=ends))
        whole = sorted_graph()
        assert torch.equal(out.metadata[-3], whole.x[out.node])
        assert torch.equal(out.metadata[-2], whole.y[out.node])
        assert torch.equal(out.metadata[-1], whole.edge_attr[out.edge])
        global_barrier(timeout=30)
    names = [f"face-{r}" for r in range(num_parts)]
    assert rpc_partition_to_workers(current, num_parts, rank) == [[name] for name in names]
    assert global_all_gather(rank) == {name: r for r, name in enumerate(names)}
    number = rpc_register(_Twice())
    global_barrier()
    assert rpc_sync(names[0], number, args=(torch.tensor(3),)).item() == 6
    assert rpc_async(names[-1], number, args=(4,)).wait() == 12
    assert torch.equal(data[0].lookup_features(torch.tensor([59, 0, 59])).wait(), sorted_graph().x[[59, 0, 59]])
    shutdown_rpc()
    assert not rpc_is_initialized()


class _Twice(RPCCallBase):
    def rpc_sync(self, x: Any) -> Any:
        return 2 * x

    def rpc_async(self, x: Any) -> Any:
        return 3 * x


def run_processes(target: Any, count: int, *args: Any) -> None:
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port  # it is free again at once
    spawn = mp.get_context("spawn")
    errors = spawn.SimpleQueue()
    processes = [spawn.Process(target=target, args=(rank, port, *args, errors)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * count, (codes, errors.get() if not errors.empty() else "no error was told")


@pytest.mark.soak
@pytest.mark.parametrize("num_parts", [3])
def test_samplers_over_stores_made_by_hand(num_parts: int) -> None:
    draw = torch.Generator().manual_seed(0)
    run_processes(sampler_process, num_parts, torch.randint(num_parts, (60,), generator=draw))


def loader_process(rank: int, port: int, root: str, options: dict[str, Any], errors: Any) -> None:
    try:
        _loader_process(rank, port, root, options)
    except BaseException as error:
        errors.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise


def _loader_process(rank: int, port: int, root: str, options: dict[str, Any]) -> None:
    data, whole = by_hand(root, rank), directed_graph()
    common = {"master_addr": "127.0.0.1", "master_port": port, "current_ctx": context(rank, 2), "rpc_worker_names": {}}
    loader = DistNeighborLoader(
        data, [3, 2], input_nodes=data[0].get_global_id(None), batch_size=5, drop_last=True, **common, **options
    )
    assert str(loader).startswith("DistNeighborLoader")
    assert str(mp.current_process().pid) in str(loader)
    assert isinstance(loader.dist_sampler, DistNeighborSampler)
    for _ in range(2):
        count = 0
        for batch in loader:
            assert isinstance(batch, Data)
            assert batch.input_id.numel() == batch.batch_size == 5
            assert torch.equal(batch.n_id[batch.edge_index], whole.edge_index[:, batch.e_id]), "e_id is global"
            assert torch.equal(batch.edge_attr, whole.edge_attr[batch.e_id])
            assert torch.equal(batch.x, whole.x[batch.n_id])
            assert torch.equal(batch.y, whole.y[batch.n_id])
            count += 1
        assert count == data[0].get_global_id(None).numel() // 5
    assert options.get("async_sampling") is False or loader.channel.empty()
    with loader as iterator:
        assert next(iter(iterator)).batch_size == 5
    links = DistLinkNeighborLoader(
        data, [2], edge_label_index=(None, data[1].get_edge_index(None, "coo")), batch_size=1, neg_sampling_ratio=1.0, **common
    )
    for number, batch in enumerate(links):
        assert batch.edge_label.tolist() == [1.0, 0.0]
        assert batch.n_id.size() == (batch.num_nodes,)
        if number == 5:
            break
    del batch


@pytest.mark.parametrize("options", [{"concurrency": 10}])
def test_loaders_over_an_address(tmp_path: Path, options: dict[str, Any]) -> None:
    Partitioner(directed_graph(), 2, tmp_path).generate_partition()
    run_processes(loader_process, 2, str(tmp_path), options)


@pytest.mark.soak
@pytest.mark.parametrize("options", [{"async_sampling": False}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
def test_loaders_in_other_ways(tmp_path: Path, options: dict[str, Any]) -> None:
    Partitioner(directed_graph(), 2, tmp_path).generate_partition()
    run_processes(loader_process, 2, str(tmp_path), options)


# --- under a process group ------------------------------------------------------------------------------------------


def script_case(worker: Worker, root: str, num_parts: int, num_classes: int) -> list[float]:
    r"""The tutorial's script: two trainers for each part, two loaders used in turn, types."""
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch_geometric.nn import GraphSAGE, to_hetero

    part = worker.rank % num_parts  # as its tutorial assigns them
    features, graph = by_hand(root, part)
    data = (features, graph)
    mine = features.get_global_id("v0").tensor_split(worker.world_size // num_parts)[worker.rank // num_parts]
    common = {"current_ctx": context(worker.rank, worker.world_size), "master_addr": "localhost", "master_port": 11111}
    train = DistNeighborLoader(data, [5, 5], input_nodes=("v0", mine), batch_size=8, shuffle=True, **common)
    test = DistNeighborLoader(data, [5, 5], input_nodes=("v0", mine[:10]), batch_size=8, **common)
    metadata = [graph.meta["node_types"], [tuple(t) for t in graph.meta["edge_types"]]]
    torch.manual_seed(0)
    model = to_hetero(GraphSAGE((-1, -1), 16, 2, num_classes), metadata)
    with torch.no_grad(), train as iterator:
        batch = next(iter(iterator))
        model(batch.x_dict, batch.edge_index_dict)
    model = DistributedDataParallel(model, process_group=worker.group, find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        total = 0.0
        for batch in train:
            optimizer.zero_grad()
            seeds = batch["v0"]
            out = model(batch.x_dict, batch.edge_index_dict)["v0"][: seeds.batch_size]
            loss = F.cross_entropy(out, seeds.y[: seeds.batch_size])
            loss.backward()
            optimizer.step()
            total += float(loss)
        losses.append(total / len(train))
        for batch in test:
            assert batch["v0"].batch_size in (8, 2, 5)
    return losses


@pytest.mark.soak
def test_a_script_of_two_trainers_for_each_part_learns(tmp_path: Path) -> None:
    data: HeteroData = FakeHeteroDataset(
        num_graphs=1, avg_num_nodes=90, avg_degree=4, num_node_types=2, num_edge_types=4, edge_dim=2, task="node"
    )[0]
    Partitioner(data, 2, tmp_path, recursive=True).generate_partition()
    for losses in launch(script_case, 4, str(tmp_path), 2, int(data["v0"].y.max()) + 1, timeout=200):
        assert losses[-1] < 0.7 * losses[0], losses


# --- pieces ---------------------------------------------------------------------------------------------------------


def test_a_partition_reads_back(tmp_path: Path) -> None:
    data = directed_graph()
    Partitioner(data, 2, tmp_path).generate_partition()
    meta, num_parts, part, node_pb, edge_pb = load_partition_info(tmp_path, 1)
    assert (meta["is_hetero"], meta["num_parts"], num_parts, part) == (False, 2, 2, 1)
    owned = [LocalFeatureStore.from_partition(tmp_path, p).get_global_id(None) for p in range(2)]
    for p, ids in enumerate(owned):
        assert bool((node_pb[ids] == p).all())
    assert torch.equal(edge_pb[torch.arange(275)], node_pb[data.edge_index[1]]), "an edge lives with its destination"
    assert sorted(node_pb.tolist()) == sorted([0] * owned[0].numel() + [1] * owned[1].numel())
    with pytest.raises(PartitionError, match="at least 2 parts"):
        Partitioner(data, 1, tmp_path)
    with pytest.raises(ValueError, match="part"):
        load_partition_info(tmp_path, 2)


def test_the_event_loop_raises_what_its_tasks_raise() -> None:
    loop = ConcurrentEventLoop(2)
    loop.start_loop()

    async def double(x: int) -> int:
        await asyncio.sleep(0)
        if x < 0:
            raise ArithmeticError("negative")
        return 2 * x

    async def awaited() -> int:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(5)
        return int(await to_asyncio_future(future))

    assert loop.run_task(double(4)) == 8
    assert loop.run_task(awaited()) == 5
    done: list[int] = []
    for x in range(5):
        loop.add_task(double(x), done.append)
    loop.wait_all()
    assert sorted(done) == [0, 2, 4, 6, 8]
    with pytest.raises(ArithmeticError):
        loop.run_task(double(-1))
    loop.add_task(double(-1))
    with pytest.raises(ArithmeticError):
        loop.wait_all()
    loop.wait_all()
    loop.shutdown_loop()
    assert "partpar-event-loop" not in [t.name for t in threading.enumerate()]


def test_duplicates_go_and_the_first_stay() -> None:
    node, drawn = torch.tensor([4, 1]), torch.tensor([1, 9, 4, 9, 0])
    new, nodes, _, _ = remove_duplicates(SamplerOutput(drawn, None, None, None), node)
    assert (new.tolist(), nodes.tolist()) == ([9, 0], [4, 1, 9, 0])
    out = SamplerOutput(torch.tensor([1, 9, 9, 9]), None, None, None, torch.tensor([0, 0, 1, 1]))
    new, nodes, new_batch, batch = remove_duplicates(out, node, torch.tensor([0, 1]), disjoint=True)
    assert (nodes.tolist(), batch.tolist()) == ([4, 1, 1, 9, 9], [0, 1, 0, 0, 1])
    assert (new.tolist(), new_batch.tolist()) == ([1, 9, 9], [0, 0, 1])


def test_small_things() -> None:
    nodes = NodeDict(["a", "b"], 2)
    assert [len(nodes.src["a"]), len(nodes.seed_time["b"]), nodes.out["a"].numel()] == [3, 2, 0]
    assert BatchDict(["a"], 1).with_dupl["a"].dtype == torch.int64
    kind = ("a", "to", "a")
    made = filter_dist_store(
        None, None, {"a": torch.tensor([3, 4])}, {kind: torch.tensor([0])}, {kind: torch.tensor([1])}, {kind: None},
        meta=({"a": torch.ones(2, 3)}, {"a": torch.tensor([0, 1])}, {kind: torch.ones(1, 2)}), input_type="a",
    )  # fmt: skip
    assert made["a"].x.shape == (2, 3)
    assert made["a"].y.tolist() == [0, 1]
    assert made[kind].edge_attr.shape == (1, 2)
    router = RPCRouter([["w0", "w1"], ["w2"]])
    assert [router.get_to_worker(0) for _ in range(3)] == ["w0", "w1", "w0"]
    with pytest.raises(ServiceError, match=r"none for parts \[1\]"):
        RPCRouter([["w0"], []])
    with pytest.raises(ServiceError, match="expected init_rpc"):
        global_barrier()
    assert DistContext(1, 1, 2, 2, "g").worker_name == "g-1"
    assert set(distributed.__all__) >= {"DistLoader", "DistRole", "load_partition_info"}
