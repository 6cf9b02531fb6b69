r"""Inference layer by layer on shares, against PyG's own classes on the whole graph in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import directed_graph
from torch import Tensor

from partpar import GraphData, models, training
from partpar.training import InferenceError, full_graph_inference

SIZES = (8, 12, 3, 4)
CASES: dict[str, dict[str, Any]] = {
    "GraphSAGE": {"norm": "batch_norm", "dropout": 0.5},
    "GIN": {"jk": "cat"},
    "GAT": {"heads": 2, "act": "elu", "jk": "max"},
    "GCN": {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}, "act_first": True},
}


def _model(kind: Any, name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    model: torch.nn.Module = getattr(kind, name)(*SIZES, **CASES[name]).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1)  # statistics of a training, so that evaluation is none of identities
            module.running_var.uniform_(0.5, 2)
    return model


def _expected(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    r"""What PyG's own model gives on the whole graph, and its weights by the names that both know."""
    data = directed_graph()
    model = _model(pyg, name).eval()
    with torch.no_grad():
        out = model(data.x, data.edge_index)
    return out, model.state_dict()


def _infer(worker: Worker, root: str, name: str, weights: dict[str, Tensor], chunks: tuple[int, ...]) -> list[Any]:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, "random")
    route = share.to_route(worker.group)
    model = _model(models, name)
    model.load_state_dict(weights, strict=False)
    model.train()
    outs = [full_graph_inference(model, share, route, chunk_size) for chunk_size in chunks]
    own = full_graph_inference(model, share, route, gather=False)
    assert model.training, "the mode comes back"
    raw_ids = share.node("dst")["raw_ids"].sort().values
    return [*outs, outs[0][raw_ids], own]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("inference")
    for num_parts in (1, 2, 4):
        GraphData.from_pyg_data(directed_graph()).partition_graph(root, num_parts, algorithm="random")
    return str(root)


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_pyg_in_raw_id_order(gang: Gang, parts: str, name: str) -> None:
    expected, weights = _expected(name)
    for world_size in (1, 2, 4):
        for outs in gang.run(_infer, world_size, parts, name, weights, (7, 1000)):
            for out in outs[:2]:
                assert (out - expected).abs().max() < 1e-10
            assert (outs[2] - outs[3]).abs().max() < 1e-10, "own rows come in ascending raw id"


def test_pyg_models_run_too() -> None:
    data = directed_graph()
    graph = GraphData.from_pyg_data(data)
    for name in ("GraphSAGE", "GIN", "GAT"):
        model = _model(pyg, name)
        expected = _expected(name)[0]
        assert (full_graph_inference(model, graph, chunk_size=11) - expected).abs().max() < 1e-10


def test_a_chunk_needs_no_more_than_its_neighbourhood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy(models.GraphSAGE):  # type: ignore[misc, name-defined]
        pass

    model = Spy(8, 4, 2, 4).double()
    for conv in model.convs:
        conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].size(0)))
    data = directed_graph()
    full_graph_inference(model, GraphData.from_pyg_data(data), chunk_size=1)
    most = 1 + int(data.edge_index[1].bincount().max())
    assert len(seen) == 2 * data.num_nodes
    assert max(seen) <= most


def test_what_cannot_run_is_refused() -> None:
    graph = GraphData.from_pyg_data(directed_graph())
    with pytest.raises(InferenceError, match="whose layers are not known"):
        full_graph_inference(torch.nn.Linear(8, 2), graph)
    with pytest.raises(InferenceError, match=r"partpar\.models\.GCN"):
        full_graph_inference(_model(pyg, "GCN"), graph)
    with pytest.raises(InferenceError, match="PairNorm"):
        full_graph_inference(pyg.GraphSAGE(8, 4, 2, norm="PairNorm"), graph)
    with pytest.raises(InferenceError, match="chunk_size of at least 1"):
        training.full_graph_inference(_model(models, "GIN"), graph, chunk_size=0)

