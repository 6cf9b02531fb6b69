r"""The service: hops and rows of whoever owns them equal those of one process that holds all."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from gang import Gang, Worker
from graphs import directed_graph
from torch import Tensor
from torch_geometric.data import HeteroData

from partpar import GraphData
from partpar.errors import GraphError, IdError, RemoteError, ServiceError
from partpar.serving import Service, agent, start_service
from partpar.serving.buffers import Buffers
from partpar.serving.cache import RowCache
from partpar.serving.hop import answer_hop
from partpar.serving.messages import HopRequest
from partpar.serving.outbox import Outbox
from partpar.serving.owner import Owner
from partpar.serving.transport import InProcessTransport, Verbs

NODE, EDGE = "node", ("node", "to", "node")


def typed_graph(seed: int = 0) -> HeteroData:
    r"""Two node types, three edge types (one of them without edges), times on nodes and edges."""
    draw = torch.Generator().manual_seed(seed)
    data = HeteroData()
    sizes = {"a": 40, "b": 25}
    for kind, size in sizes.items():
        data[kind].x = torch.randn(size, 3, generator=draw)
        data[kind].time = torch.randint(100, (size,), generator=draw)
        data[kind].num_nodes = size
    for edge_type, num in ((("a", "to", "b"), 150), (("b", "rev", "a"), 90), (("a", "none", "a"), 0)):
        ends = [torch.randint(sizes[edge_type[i]], (num,), generator=draw) for i in (0, 2)]
        data[edge_type].edge_index = torch.stack(ends)
        data[edge_type].edge_attr = torch.randn(num, 2, generator=draw)
    return data


def assignment(num_nodes: int, num_parts: int, seed: int = 0) -> Tensor:
    return torch.randint(num_parts, (num_nodes,), generator=torch.Generator().manual_seed(seed))


def cut(root: Path, num_parts: int, data: object | None = None) -> None:
    graph = GraphData.from_pyg_data(directed_graph() if data is None else data)
    parts = {t: assignment(graph.num_nodes(t), num_parts) for t in graph.node_types}
    graph.partition_graph(root, num_parts, algorithm="given", partition_kwargs={"assignment": parts})


def together(root: Path, num_parts: int, cache_bytes: int = 1 << 20) -> list[Service]:
    r"""The services of all parts in this process."""
    owners = []
    for part in range(num_parts):
        share = GraphData.load_partition(root, part, num_parts, "given")
        owners.append(Owner(share, RowCache(share, cache_bytes)))
    transport = InProcessTransport({p: owner.verbs for p, owner in enumerate(owners)})
    return [Service(owner, transport) for owner in owners]


def check_rows(service: Service, data: object, seed: int = 0) -> None:
    r"""All ways to rows agree with the graph that was cut."""
    draw = torch.Generator().manual_seed(seed)
    for kind in [*service.node_types, *service.edge_types]:
        typed = not isinstance(data, type(directed_graph()))
        store = data[kind] if typed else data  # type: ignore[index]
        names = ["x"] if isinstance(kind, str) else ["edge_attr"]
        total = int((service.offsets(kind) if isinstance(kind, str) else service.edge_offsets(kind))[-1])
        assert total == (store.num_nodes if isinstance(kind, str) else store.edge_index.size(1))
        raw = torch.randint(max(total, 1), (0 if total == 0 else 70,), generator=draw)  # in no order, some twice
        for raw_ids in (raw, raw[:1], raw[:0], torch.arange(total)):
            ids = service.ids_of(kind, raw_ids)
            assert torch.equal(service.raw_ids_of(kind, ids), raw_ids)
            rows = service.fetch(kind, names, ids)
            assert torch.equal(rows[names[0]], store[names[0]][raw_ids])


def check_hops(service: Service, root: Path, num_parts: int, **options: object) -> None:
    r"""A hop from any rank equals what the owners answer one by one."""
    shares = [GraphData.load_partition(root, p, num_parts, "given") for p in range(num_parts)]
    requests = {}
    for edge_type in service.edge_types:
        total = int(service.offsets(edge_type[2])[-1])
        ids = torch.randperm(total, generator=torch.Generator().manual_seed(3))[:30]
        requests[edge_type] = HopRequest(edge_type, ids, 3, 17, with_edge_rows=True, **options)  # type: ignore[arg-type]
    replies = service.hop_begin(requests).wait()
    for edge_type, request in requests.items():
        offsets, reply = service.offsets(edge_type[2]), replies[edge_type]
        for i, counted in enumerate(reply.counts.tolist()):
            owner = int(torch.searchsorted(offsets, request.ids[i], right=True)) - 1
            alone = answer_hop(shares[owner], request.take(torch.tensor([i])))
            low = int(reply.counts[:i].sum())
            assert counted == alone.counts.item()
            for name in ("ids", "raw_ids", "edge_ids", "edge_rows"):
                assert torch.equal(getattr(reply, name)[low : low + counted], getattr(alone, name))
        raw = service.raw_ids_of(edge_type, reply.edge_rows)
        assert torch.equal(raw, reply.edge_ids), "an edge's id leads to its row"


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_all_parts_in_one_process(tmp_path, num_parts):
    for k, data in enumerate((directed_graph(), typed_graph())):
        root = tmp_path / str(k)
        cut(root, num_parts, data)
        for cache_bytes in (0, 200, 1 << 20):
            for service in together(root, num_parts, cache_bytes):
                check_rows(service, data)
                check_hops(service, root, num_parts)


def test_whole_graph_is_served_alone():
    data = directed_graph()
    by_destination = data.edge_index[1].argsort(stable=True)
    data.edge_index, data.edge_attr = data.edge_index[:, by_destination], data.edge_attr[by_destination]
    with start_service(GraphData.from_pyg_data(data)) as service:
        check_rows(service, data)
        assert service.ping(0) < 1


def case_rows(worker: Worker, root: Path, num_parts: int, typed: bool) -> dict:
    share = GraphData.load_partition(root, worker.rank // (worker.world_size // num_parts), num_parts, "given")
    data = typed_graph() if typed else directed_graph()
    with start_service(share, timeout=20) as service:
        assert max(service.ping(p) for p in range(num_parts)) < 20
        check_rows(service, data, worker.rank)
        check_hops(service, root, num_parts)
        report = service.cache_report()
        if typed:
            check_temporal(service, data)
    assert not agent.is_running()
    return report


def case_servers(worker: Worker, root: Path, num_parts: int) -> list[int]:
    share = GraphData.load_partition(root, worker.rank // (worker.world_size // num_parts), num_parts, "given")
    with start_service(share, timeout=60, servers=root / f"given_{num_parts}") as service:
        assert service.transport.name(0) == "part 0 (server-0)"
        check_rows(service, directed_graph(), worker.rank)
        check_hops(service, root, num_parts)
        torch.distributed.barrier()
        if worker.rank == 0:
            everything = torch.arange(60)
            service.put(NODE, "y", everything, torch.full((60,), 7))
        torch.distributed.barrier()
        assert bool((service.node_rows(NODE, "y", torch.arange(60)) == 7).all())
        children = [p.pid for p in psutil.Process().children()]
    assert not any(psutil.pid_exists(pid) for pid in children)
    return children


@pytest.mark.soak
def test_servers_of_their_own(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    assert [len(pids) for pids in gang.run(case_servers, 4, tmp_path, 2, timeout=90)] == [1, 0, 1, 0]


def case_addresses(worker: Worker, root: Path) -> set[str]:
    with start_service(GraphData.load_partition(root, worker.rank, 2, "given"), timeout=20):
        torch.distributed.barrier()
        listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        return {c.laddr.ip.removeprefix("::ffff:") for c in listening}


def test_workers_of_one_machine_listen_on_loopback(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    assert set().union(*gang.run(case_addresses, 2, tmp_path)) == {"127.0.0.1"}


def check_temporal(service: Service, data: HeteroData) -> None:
    r"""Times of nodes of the halo are brought when a hop first needs them."""
    edge_type = ("a", "to", "b")
    ids = service.ids_of("b", torch.arange(25))
    for limit in (10, 50):
        times = torch.full((25,), limit)
        request = HopRequest(edge_type, ids, -1, 1, time_attr="time", times=times)
        reply = service.hop_begin({edge_type: request}).wait()[edge_type]
        expected = (data["a"].time[data[edge_type].edge_index[0]] <= limit).sum()
        assert reply.ids.numel() == expected
        assert bool((data["a"].time[reply.raw_ids] <= limit).all())


@pytest.mark.parametrize(("num_parts", "world"), [(2, 2), (2, 4), (4, 4)])
def test_parts_in_several_processes(gang: Gang, tmp_path, num_parts, world):
    for typed in (False, True):
        root = tmp_path / str(typed)
        cut(root, num_parts, typed_graph() if typed else None)
        reports = gang.run(case_rows, world, root, num_parts, typed)
        key = ("a" if typed else NODE, "x")
        assert all(report[key]["hits"] > 0 and report[key]["misses"] >= 0 for report in reports)
        if num_parts == 2:
            assert all(report[key]["hit_rate"] > 0.5 for report in reports)


def case_put(worker: Worker, root: Path) -> None:
    import torch.distributed as dist

    num_parts = 2
    share = GraphData.load_partition(root, worker.rank // (worker.world_size // num_parts), num_parts, "given")
    with start_service(share, timeout=20) as service:
        everything = torch.arange(60)
        before = service.fetch(NODE, ["x"], everything)["x"]
        dist.barrier()
        if worker.rank == 0:
            ids = torch.tensor([5, 55, 5, 30])  # of both parts, one twice
            rows = torch.stack([torch.full((8,), float(k), dtype=torch.float64) for k in range(4)])
            service.put(NODE, "x", ids, rows)
        dist.barrier()
        after = service.fetch(NODE, ["x"], everything)["x"]
        expected = before.clone()
        expected[5], expected[55], expected[30] = 2.0, 1.0, 3.0
        assert torch.equal(after, expected)
        dist.barrier()


def test_rows_that_were_put_are_seen_by_all(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    gang.run(case_put, 4, tmp_path)


def test_put_is_checked_here(tmp_path):
    cut(tmp_path, 2)
    service = together(tmp_path, 2)[0]
    with pytest.raises(GraphError, match="float64"):
        service.put(NODE, "x", torch.tensor([1]), torch.zeros(1, 8))
    with pytest.raises(IdError, match="60"):
        service.put(NODE, "x", torch.tensor([60]), torch.zeros(1, 8, dtype=torch.float64))


def test_wrong_ids_and_names_are_refused(tmp_path):
    cut(tmp_path, 2)
    service = together(tmp_path, 2)[0]
    with pytest.raises(IdError, match="-1 at position 2"):
        service.fetch(NODE, ["x"], torch.tensor([0, 59, -1]))
    with pytest.raises(GraphError, match="expected an attribute of"):
        service.fetch(NODE, ["z"], torch.tensor([0]))
    with pytest.raises(IdError, match="the first 99"):
        service.ids_of(NODE, torch.tensor([3, 99]))
    with pytest.raises(RemoteError, match=r"part 1 failed in 'fetch'.*[\s\S]*IdError"):
        service.begin(1, "fetch", {"0": torch.tensor([1000])}, {"wanted": [[NODE, ["x"]]]}).wait()
    with pytest.raises(RemoteError, match="expected a verb"):
        service.begin(1, "eval", {}, {}).wait()


def test_messages_hold_tensors_and_plain_values_only():
    verbs = Verbs()
    verbs.register("echo", lambda tensors, values: tensors)
    for values in ({"a": object()}, {"a": {"b": {"c": [[[[[1]]]]]}}}, {"a": [0] * (1 << 17)}, {"a": "x" * (1 << 21)}):
        with pytest.raises(ServiceError, match="expected"):
            verbs.answer("echo", {}, values)
    for tensor in (torch.zeros(2).to_sparse(), torch.nn.Parameter(torch.zeros(2))):
        with pytest.raises(ServiceError, match="dense"):
            verbs.answer("echo", {"t": tensor}, {})
    with pytest.raises(ServiceError, match="new verb"):
        verbs.register("echo", lambda tensors, values: tensors)


def test_buffers_are_used_again_once_nobody_needs_them():
    buffers = Buffers()
    first = buffers.empty((1 << 18, 2), torch.float32)
    view = first[5:]  # keeps the memory as well
    address = first.data_ptr()
    del first
    second = buffers.empty((1 << 18, 2), torch.float32)
    assert second.data_ptr() != address and second.shape == (1 << 18, 2)
    del view
    third = buffers.empty((1 << 18,), torch.int64)
    assert third.data_ptr() == address and third.dtype == torch.int64
    many = [buffers.empty((1 << 20,), torch.uint8) for _ in range(40)]
    assert len({tensor.data_ptr() for tensor in (second, third, *many)}) == 42
    assert buffers.empty((3,), torch.bool).shape == (3,)


def test_large_answers_are_kept_until_fetched():
    outbox = Outbox(piece=1000)
    x = torch.randn(600, dtype=torch.float64)
    small, values = outbox.hold({"x": x, "y": torch.zeros(3)})
    ticket, dtype, shape = values["held"]["x"]
    assert list(small) == ["y"] and (dtype, shape) == ("float64", [600])
    pieces = [outbox.take(ticket, low, min(low + 1000, 4800)) for low in range(0, 4800, 1000)]
    assert torch.equal(torch.cat(pieces).view(torch.float64), x)
    with pytest.raises(ServiceError, match="kept"):
        outbox.take(ticket, 0, 1000)
    with pytest.raises(ServiceError):
        outbox.take(outbox.hold({"x": x})[1]["held"]["x"][0], 0, 2000)


def case_large(worker: Worker, root: Path) -> None:
    with start_service(GraphData.load_partition(root, worker.rank, 2, "given"), timeout=20) as service:
        big = torch.arange(5 << 20)  # 40 MB, three pieces
        service.register("big", lambda tensors, values: {"big": big, "few": tensors["few"]})
        torch.distributed.barrier()
        answer = service.begin(1 - worker.rank, "big", {"few": torch.ones(2)}).wait()
        assert torch.equal(answer["big"], big) and answer["few"].sum() == 2


def test_large_answers_come_in_pieces(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    gang.run(case_large, 2, tmp_path)
