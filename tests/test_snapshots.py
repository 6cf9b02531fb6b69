r"""Temporal graphs: windows of time, their shares and routes, and a recurrent network that trains as in one process."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph, npz_path, typed_graph
from pairs import rank_cases
from partpar.models import RecurrentGCN
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data
from typed_models import Runs, errors

from partpar import GraphData, datasets, nn
from partpar.errors import GraphError, PartitionError
from partpar.exchange import meter
from partpar.kernels import counter
from partpar.nn import fetch_ahead, global_mean
from partpar.partition.manifest import read_manifest
from partpar.training.pairs import make_pairs

STEPS, FEATURES, HIDDEN, WINDOWS = 20, 6, 5, 5


@functools.cache
def temporal(graph: str) -> Data:
    if graph == "generated":
        data, draw = directed_graph(num_edges=400), torch.Generator().manual_seed(3)
        time = torch.randint(1000, (data.edge_index.size(1),), generator=draw)
        time[(time > 400) & (time < 600)] = 100  # a window without an edge
        return Data(edge_index=data.edge_index, t=time, num_nodes=data.num_nodes)
    data = datasets.from_npz(npz_path(graph))
    return Data(edge_index=data.edge_index.long(), t=data.t, num_nodes=data.num_nodes)


def windows(data: Data) -> list[Tensor]:
    r"""The edges of each window, straight from the definition."""
    first, last = float(data.t.min()), float(data.t.max())
    bounds = [first + (last - first) * k / WINDOWS for k in range(WINDOWS + 1)]
    bounds[-1] = float("inf")
    time = data.t.double()  # of whole numbers compared with a float, torch would round to float32
    return [((time >= a) & (time < b)).nonzero().flatten() for a, b in itertools.pairwise(bounds)]


def features(raw_ids: Tensor, window: int) -> Tensor:
    return counter.uniform(0, window, 0, raw_ids, FEATURES, torch.float64) - 0.5


class OneProcess(torch.nn.Module):
    r"""The same network of PyG's and torch's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = pyg.GCNConv(FEATURES, HIDDEN), pyg.GCNConv(HIDDEN, HIDDEN)
        self.cell, self.decoder = torch.nn.GRUCell(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN)


@functools.cache
def reference(graph: str, steps: int) -> tuple[dict[str, Tensor], Runs]:
    data, n = temporal(graph), temporal(graph).num_nodes
    torch.manual_seed(0)
    model = OneProcess().double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    cut = windows(data)

    def loss() -> Tensor:
        hidden, losses = torch.zeros(n, HIDDEN, dtype=torch.float64), []
        for k in range(WINDOWS - 1):
            edges = data.edge_index[:, cut[k]]
            z = model.second(F.relu(model.first(features(torch.arange(n), k), edges)), edges)
            hidden = model.cell(z, hidden)
            source, target = data.edge_index[:, cut[k + 1]]
            if source.numel() == 0:
                continue
            other = (counter.uniform(0, k + 1, 0, cut[k + 1], 1, torch.float64).squeeze(1) * n).long()
            decoded = model.decoder(hidden)
            logits = (decoded[torch.cat([source, other])] * hidden[target.repeat(2)]).sum(-1)
            label = torch.cat([torch.ones(source.numel()), torch.zeros(source.numel())]).double()
            losses.append(F.binary_cross_entropy_with_logits(logits, label))
        return torch.stack(losses).sum()

    return state, train(model, loss, steps)


def train(model: torch.nn.Module, loss_of: Callable[[], Tensor], steps: int) -> Runs:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, grads = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"recurrent": (torch.stack(losses), torch.stack(grads), weights)}


class Sequence(torch.nn.Module):
    r"""The loss over all windows, on a share."""

    def __init__(self, model: RecurrentGCN, share: GraphData, group: Any) -> None:
        super().__init__()
        self.model, self.snapshots = model, share.snapshots(group)
        self.pairs = [make_pairs(s, int(share.offsets()[-1]), 0, group, torch.float64) for s in self.snapshots]
        counts = [make_count(pairs.label, self.snapshots[0].route) for pairs in self.pairs]
        self.filled = [count > 0 for count in counts]

    def forward(self) -> Tensor:
        state, losses = None, []
        ids = self.snapshots[0].share.node("dst")["raw_ids"]
        for snapshot, x in fetch_ahead(self.snapshots[:-1], lambda s: features(ids, s.index)):
            state = self.model(x, snapshot.share.adj(), state, snapshot.route)
            if not self.filled[snapshot.index + 1]:
                continue
            pairs = self.pairs[snapshot.index + 1]
            logits = self.model.score(pairs.route.apply(state), state[pairs.destination])
            rows = F.binary_cross_entropy_with_logits(logits, pairs.label, reduction="none")
            losses.append(global_mean(rows, route=snapshot.route))
        return torch.stack(losses).sum()


def make_count(rows: Tensor, route: Any) -> int:
    from partpar.exchange import all_reduce_sum

    return int(all_reduce_sum(torch.tensor(rows.numel()), route.group))


def worker_case(
    worker: Worker, root: Path, algorithm: str, state: dict[str, Tensor], steps: int
) -> tuple[Runs, list[Tensor], int]:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    model = RecurrentGCN(FEATURES, HIDDEN).double()
    model.load_state_dict(state)
    sequence = Sequence(model, share, worker.group)
    raw_edges = [s.share.edge()["raw_ids"] for s in sequence.snapshots]
    whole = share.to_route(worker.group)
    for snapshot in sequence.snapshots:  # the halo is what the window's edges need, and nothing else
        sources = snapshot.share.edge_index()[0]
        needed = snapshot.share.node("src")["raw_ids"][sources[sources >= share.num_owned()]].unique()
        assert torch.equal(needed, snapshot.route.raw_ids[share.num_owned() :].sort().values)
        assert snapshot.route.num_halo <= whole.num_halo
    parallel = DistributedDataParallel(sequence, process_group=worker.group)
    return train(parallel, parallel, steps), raw_edges, len(sequence.snapshots)


def agree(gang: Gang, folder: Path, graph: str, algorithm: str, parts: int, steps: int) -> None:
    data = temporal(graph)
    whole = GraphData.from_pyg_data(data)
    whole.partition_graph(folder, parts, algorithm=algorithm, time_attr="t", num_snapshots=WINDOWS)
    state, expected = reference(graph, steps)
    results = gang.run(worker_case, parts, folder, algorithm, state, steps, timeout=250)
    for runs, _, count in results:
        assert count == WINDOWS
        assert max(errors(runs, expected).values()) < 1e-10
    for k, edges in enumerate(windows(data)):
        assert torch.equal(torch.cat([raw[k] for _, raw, _ in results]).sort().values, edges)
    losses = expected["recurrent"][0]
    assert float(losses[-1]) < float(losses[0]) - 1e-4


CORE = [(2, "generated", "metis"), (4, "generated", "random")]


@pytest.mark.filterwarnings("ignore:.*balance")
@pytest.mark.parametrize(
    ("world_size", "graph", "algorithm"),
    rank_cases(CORE, ("generated", "bitcoin_otc"), ("metis", "multi-constraint-metis", "ldg", "random")),
)
def test_a_recurrent_network_trains_as_in_one_process(
    gang: Gang, tmp_path: Path, world_size: int, graph: str, algorithm: str
) -> None:
    agree(gang, tmp_path, graph, algorithm, world_size, STEPS)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_so_does_it_on_a_large_one(gang: Gang, tmp_path: Path) -> None:
    agree(gang, tmp_path, "sx_mathoverflow", "metis", 2, 3)


def ahead_case(worker: Worker, root: Path) -> list[tuple[int, int]]:
    r"""Exchanges begun when each snapshot is handed out, and those that a first layer then adds."""
    share = GraphData.load_partition(root, worker.rank, worker.world_size, "random")
    snapshots, conv = share.snapshots(worker.group), nn.GCNConv(FEATURES, HIDDEN).double()
    ids = share.node("dst")["raw_ids"]
    for s in snapshots:  # the degrees of the halo are fetched once
        conv(features(ids, s.index), s.share.adj(), s.route)
    meter.reset()
    found = []
    for s, x in fetch_ahead(snapshots, lambda s: features(ids, s.index)):
        begun = meter.calls
        out = conv(x, s.share.adj(), s.route)
        torch.testing.assert_close(out, conv(features(ids, s.index), s.share.edge_index(), s.route))
        meter.calls -= 2  # of the comparison: degrees and rows
        found.append((begun, meter.calls - begun))
    return found


def test_the_next_rows_leave_before_work_on_these(gang: Gang, tmp_path: Path) -> None:
    whole = GraphData.from_pyg_data(temporal("generated"))
    whole.partition_graph(tmp_path, 2, algorithm="random", time_attr="t", num_snapshots=WINDOWS)
    for found in gang.run(ahead_case, 2, tmp_path):
        assert found == [(min(k + 2, WINDOWS), 0) for k in range(WINDOWS)]


def typed_case(worker: Worker, root: Path) -> list[tuple[int, dict[Any, int]]]:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, "random")
    found = []
    for snapshot in share.snapshots(worker.group):
        out = snapshot.route.apply(share.collect("x"))
        assert {t: rows.size(0) for t, rows in out.items()} == {
            t: snapshot.share.node(t, "src").num_rows for t in share.node_types
        }
        found.append((snapshot.index, {e: snapshot.share.num_edges(e) for e in share.edge_types}))
    return found


def test_typed_graphs_have_snapshots_too(gang: Gang, tmp_path: Path) -> None:
    data = typed_graph()
    static = ("a", "aa", "a")
    del data[static]["t"]
    whole = GraphData.from_pyg_data(data)
    path = whole.partition_graph(tmp_path, 3, algorithm="random", time_attr="t", boundaries=[0.25, 0.5, 1.0])
    assert read_manifest(path).windows.boundaries == (0.25, 0.5, 1.0)
    results = gang.run(typed_case, 3, tmp_path)
    for k, (low, high) in enumerate(((0.25, 0.5), (0.5, 1.0))):
        for e in data.edge_types:
            total = sum(found[k][1][e] for found in results)
            inside = data[e].num_edges if e == static else int(((data[e].t >= low) & (data[e].t < high)).sum())
            assert total == inside


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    whole = GraphData.from_pyg_data(temporal("generated"))
    for arguments, message in (
        ({"num_snapshots": 3}, "time_attr: expected the edge attribute"),
        ({"time_attr": "when", "num_snapshots": 3}, r"expected the name of an edge attribute \(\['t'\]\)"),
        ({"time_attr": "t"}, "expected either num_snapshots or boundaries"),
        ({"time_attr": "t", "num_snapshots": 3, "boundaries": [0, 1]}, "expected either"),
        ({"time_attr": "t", "num_snapshots": 0}, "expected at least 1, found 0"),
        ({"time_attr": "t", "num_snapshots": 5000}, "ask for fewer"),
        ({"time_attr": "t", "boundaries": [3, 3]}, "at least 2 rising finite numbers"),
    ):
        with pytest.raises(PartitionError, match=message):
            whole.partition_graph(tmp_path, 1, **arguments)
    data = temporal("generated").clone()
    data.t = data.t.double()
    data.t[7] = float("nan")
    with pytest.raises(PartitionError, match="time_attr 't': expected one finite number an edge, found nan at edge 7"):
        GraphData.from_pyg_data(data).partition_graph(tmp_path, 1, time_attr="t", num_snapshots=2)
    whole.partition_graph(tmp_path, 1)
    with pytest.raises(GraphError, match="found one without windows of time"):
        GraphData.load_partition(tmp_path, 0, 1).snapshots()
    whole.partition_graph(tmp_path, 1, time_attr="t", num_snapshots=2, overwrite=True)
    assert [s.index for s in GraphData.load_partition(tmp_path, 0, 1).snapshots()] == [0, 1]
