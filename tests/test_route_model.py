r"""PyG's own models, unedited, on several workers; those made by ``to_hetero`` are in ``test_hetero.py``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph, typed_graph
from pairs import rank_cases
from test_exactness import ALGORITHMS, SGD, ZOO, Losses, Run, build, error, load, partitions, reference, train
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partpar import GraphData, Route
from partpar.errors import RouteError
from partpar.nn import global_mean, route_model

assert partitions  # the fixture


def worker_case(
    worker: Worker, root: Path, algorithm: str, state: dict[str, Tensor], kernels: bool
) -> dict[str, Run]:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    route, owned = share.to_route(worker.group), share.node("dst")
    edges = share.adj() if kernels else share.edge_index()
    plain = build(pyg, share.meta())
    plain.load_state_dict(state)
    plain = torch.nn.ModuleDict({name: plain[name] for name in ZOO})
    built = torch.nn.ModuleDict({name: route_model(plain[name]) for name in ZOO}).double()

    def loss_of(model: torch.nn.Module) -> Tensor:
        out = model(owned["x"], edges, route=route)
        return global_mean(F.cross_entropy(out, owned["y"], reduction="none"), owned["train_mask"], route)

    parallel = DistributedDataParallel(
        Losses(built, loss_of), process_group=worker.group, broadcast_buffers=False
    )
    return train(parallel, built, SGD)


CORE = [(2, "directed", "given", True), (4, "directed", "random", False)]


@pytest.mark.filterwarnings("ignore:.*balance")
@pytest.mark.parametrize(
    ("world_size", "graph", "algorithm", "kernels"), rank_cases(CORE, ("directed", "cora"), ALGORITHMS, (True, False))
)
def test_pygs_models_train_as_in_one_process(
    gang: Gang, partitions: Any, world_size: int, graph: str, algorithm: str, kernels: bool
) -> None:
    state, expected, _ = reference(graph)
    root = partitions(graph, algorithm, world_size)
    wrong = {}
    for rank, runs in enumerate(gang.run(worker_case, world_size, root, algorithm, state, kernels, timeout=120)):
        for name in ZOO:
            for what in ("losses", "grads", "weights"):
                wrong[rank, name, what] = error(getattr(runs[name], what), getattr(expected[SGD][name], what))
    assert not {what: e for what, e in wrong.items() if not e < 1e-10}


def test_the_model_given_stays_as_it_is() -> None:
    data = directed_graph()
    model = pyg.GIN(8, 8, 2, 4, norm="batch_norm").double()
    before = copy.deepcopy(model.state_dict())
    routed = route_model(model)
    out = routed(data.x, data.edge_index, route=Route.trivial(60))
    torch.testing.assert_close(out, model(data.x, data.edge_index))
    assert list(routed.state_dict()) == list(before) and type(routed) is pyg.GIN
    again = copy.deepcopy(routed)
    torch.testing.assert_close(again(data.x, data.edge_index), out)
    for one, other in zip(routed.parameters(), model.parameters(), strict=True):
        assert one is not other
    with pytest.raises(RouteError, match=r"expected route=share.to_route\(\), found int"):
        routed(data.x, data.edge_index, route=3)
    with pytest.raises(ValueError, match="knows nothing of routes"):
        route_model(_Taking())


class _Taking(torch.nn.Module):
    def forward(self, x: Tensor, route: Any) -> Tensor:
        return x


class _Net(torch.nn.Module):
    r"""As users write them: edge weights by place, dropout, weights that GCN takes."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.drop, self.second = pyg.GCNConv(8, 8), torch.nn.Dropout(p), pyg.GCNConv(8, 4)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        x = self.drop(self.first(x, edge_index, edge_weight).relu())
        return self.second(x, edge_index, edge_weight)


def weighted_case(worker: Worker, root: Path, algorithm: str, p: float) -> tuple[Tensor, Tensor]:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    route, owned = share.to_route(worker.group), share.node("dst")
    torch.manual_seed(0)
    model = route_model(_Net(p).double())
    out = model(owned["x"], share.adj(), share.edge()["edge_weight"], route=route)
    return owned["raw_ids"], out.detach()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_arguments_by_place_and_dropout(gang: Gang, partitions: Any, p: float) -> None:
    data = load("directed")
    torch.manual_seed(0)
    plain = _Net().double()
    expected = plain(data.x, data.edge_index, data.edge_weight)
    whole = []
    for parts in (1, 3):
        results = gang.run(weighted_case, parts, partitions("directed", "random", parts), "random", p)
        rows = torch.empty_like(expected)
        for raw_ids, out in results:
            rows[raw_ids] = out
        whole.append(rows)
    torch.testing.assert_close(whole[1], whole[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(whole[0], expected, rtol=1e-10, atol=1e-10) == (p == 0)


def test_what_cannot_be_exact_is_refused() -> None:
    for model, message in (
        (torch.nn.Sequential(pyg.PairNorm()), "PairNorm"),
        (torch.nn.Sequential(pyg.SAGEConv(8, 8, flow="target_to_source")), "expected flow='source_to_target'"),
        (torch.nn.Sequential(pyg.ARMAConv(8, 8)), "take a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            route_model(model)
    typed = GraphData.from_pyg_data(typed_graph()).to_route()
    with pytest.raises(RouteError, match="called through HeteroConv"):
        route_model(pyg.SAGEConv(8, 8))(torch.zeros(3, 8), torch.zeros(2, 0, dtype=torch.int64), route=typed)
