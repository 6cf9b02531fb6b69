r"""Typed graphs on several workers give what PyG's own classes give in one process: RGCN, HeteroSAGE, HGT, HAN, any
convolutions in a HeteroConv, and models made by ``to_hetero``.

Errors are max ``|a - b| / max(1, |b|)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from gang import Gang, Worker
from graphs import typed_graph
from pairs import rank_cases
from torch import Tensor
from torch_geometric.data import HeteroData
from typed_models import HIDDEN, LAYERS, NAMES, Joined, build, errors, load, reference, worker_case

from partpar import GraphData, HeteroRoute, nn
from partpar.errors import RouteError
from partpar.exchange import meter

WAYS = ("edge_index", "adj", "kept")
ALGORITHMS = ("metis", "multi-constraint-metis", "ldg", "random", "given")


@pytest.fixture(scope="session")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], Path]:
    r"""``(graph, algorithm, num_parts)`` to the root of that partition, cut once."""
    folder = tmp_path_factory.mktemp("typed")

    @functools.cache
    def partition(graph: str, algorithm: str, num_parts: int) -> Path:
        data = load(graph).data
        options = {}
        if algorithm == "given":  # nobody is in part 0, unless it is the only one, and type d is all in the last
            draw = torch.Generator().manual_seed(num_parts)
            assignment = {
                t: torch.randint(min(1, num_parts - 1), num_parts, (data[t].num_nodes,), generator=draw)
                for t in data.node_types
            }
            assignment[data.node_types[-1]].fill_(num_parts - 1)
            options = {"assignment": assignment}
        weights = ["#nodes:*", "train_mask:*"] if algorithm == "multi-constraint-metis" else None
        whole = GraphData.from_pyg_data(data)
        whole.partition_graph(folder / graph, num_parts, weights, algorithm=algorithm, partition_kwargs=options)
        return folder / graph

    return partition


def agree(
    gang: Gang, root: Path, graph: str, algorithm: str, way: str, num_parts: int, steps: int, names: tuple[str, ...] = NAMES
) -> None:
    expected = reference(graph, steps, names)
    results = gang.run(worker_case, num_parts, root, graph, algorithm, way, steps, names, timeout=280)
    wrong = {
        (rank, *what): e for rank, runs in enumerate(results) for what, e in errors(runs, expected).items()
    }
    assert len(wrong) == 3 * len(names) * num_parts
    assert not {what: e for what, e in wrong.items() if not e < 1e-10}


CORE = [(2, "generated", "given", "kept")]


@pytest.mark.filterwarnings("ignore:.*balance", "ignore:There exist node types")
@pytest.mark.parametrize(
    ("world_size", "graph", "algorithm", "way"), rank_cases(CORE, ("generated", "dblp"), ALGORITHMS, WAYS)
)
def test_training_is_that_of_one_process(
    gang: Gang, cut: Any, world_size: int, graph: str, algorithm: str, way: str
) -> None:
    names = NAMES if graph == "generated" else LAYERS
    agree(gang, cut(graph, algorithm, world_size), graph, algorithm, way, world_size, 20, names)


def test_a_real_graph_in_short(gang: Gang, cut: Any) -> None:
    agree(gang, cut("dblp", "metis", 2), "dblp", "metis", "kept", 2, 2, LAYERS)


def test_hgt_trains_what_some_output_depends_on() -> None:
    metadata = (["a", "b"], [("b", "to", "a")])
    edges = {metadata[1][0]: torch.tensor([[0, 1, 2], [0, 0, 1]])}
    for widths in (HIDDEN, {"a": HIDDEN, "b": 3}, {"a": 3, "b": HIDDEN}):
        conv, theirs = (zoo.HGTConv(widths, HIDDEN, metadata, heads=2) for zoo in (nn, pyg))
        x = {t: torch.randn(3, conv.in_channels[t]) for t in ("a", "b")}
        for layer in (conv, theirs):
            layer(x, edges)["a"].sum().backward()
        wanted = [name for name, p in theirs.named_parameters() if p.grad is not None]
        assert [name for name, p in conv.named_parameters() if p.requires_grad] == wanted
        assert [name for name, p in conv.named_parameters() if p.grad is not None] == wanted


def test_forgotten_route_is_named(tmp_path: Path) -> None:
    whole = GraphData.from_pyg_data(typed_graph())
    whole.partition_graph(tmp_path, 2, algorithm="random")
    share = GraphData.load_partition(tmp_path, 0, 2, "random")
    x = {t: rows.float() for t, rows in share.collect("x").items()}
    widths, metadata = {t: rows.size(1) for t, rows in x.items()}, (share.node_types, share.edge_types)
    for conv in (nn.HGTConv(widths, HIDDEN, metadata, heads=2), nn.HANConv(widths, HIDDEN, metadata, heads=2)):
        with pytest.raises(RouteError, match=f"{type(conv).__name__}: .* needs its route: pass route=share.to_route"):
            conv(x, share.adj_dict())


def test_rgcn_under_autocast() -> None:
    share = GraphData.from_pyg_data(typed_graph())
    torch.manual_seed(0)
    conv, x = nn.RGCNConv(8, HIDDEN, share.edge_types), {t: rows.float() for t, rows in share.collect("x").items()}
    expected = conv(x, share.adj_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(conv(x, share.adj_dict()), share.adj_dict())
        first = conv(x, share.adj_dict())
    assert {rows.dtype for rows in out.values()} == {torch.bfloat16}
    for t, rows in first.items():
        torch.testing.assert_close(rows.float(), expected[t], rtol=0.05, atol=0.05)


def test_aggregates_of_constant_rows_are_made_anew_when_any_rows_change() -> None:
    share = GraphData.from_pyg_data(typed_graph())
    torch.manual_seed(0)
    conv, edges = nn.RGCNConv(8, HIDDEN, share.edge_types), share.adj_dict()
    x = {t: rows.float() for t, rows in share.collect("x").items()}
    constant = nn.keep_halos(x)
    for changed in ("nothing", *x):
        for rows in x.values() if changed == "nothing" else (x[changed],):
            rows.mul_(2)
        found, expected = conv(constant, edges), conv(x, edges)
        for t, rows in expected.items():
            torch.testing.assert_close(found[t], rows, msg=f"rows of {t!r} after a change of {changed!r}")


def test_rgcn_multiplies_on_the_cheaper_side() -> None:
    r"""Few sources and many destinations, the other way round, and widths that differ: the same to second derivatives."""
    data = HeteroData()
    for t, count in (("few", 3), ("many", 40), ("more", 5)):
        data[t].x = torch.randn(count, 6, dtype=torch.float64)
    for source, target in (("few", "many"), ("more", "many"), ("many", "few"), ("many", "many")):
        ends = [torch.randint(data[t].num_nodes, (60,)) for t in (source, target)]
        data[source, "to", target].edge_index = torch.stack(ends)
    share, joined = GraphData.from_pyg_data(data), data.to_homogeneous()
    for aggr, width in (("mean", 4), ("sum", 9)):
        conv = nn.RGCNConv(6, width, share.edge_types, aggr=aggr).double()
        plain = pyg.RGCNConv(6, width, len(share.edge_types), aggr=aggr).double()
        plain.load_state_dict(conv.state_dict())
        x = {t: data[t].x.clone().requires_grad_() for t in data.node_types}
        whole = torch.cat(list(x.values()))
        ours = torch.cat(list(conv(x, share.adj_dict()).values()))
        theirs = plain(whole, joined.edge_index, joined.edge_type)
        for out, layer in ((ours, conv), (theirs, plain)):
            slopes = torch.autograd.grad(out.square().sum(), [*x.values(), *layer.parameters()], create_graph=True)
            bends = torch.autograd.grad(sum(s.square().sum() for s in slopes), list(x.values()))
            results = [out, *slopes, *bends]
            if layer is conv:
                expected = results
        for found, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_reference_learns() -> None:
    for name, (losses, grads, _) in reference("generated", 20, NAMES).items():
        assert float(losses[-1]) < float(losses[0]) - 0.005, name
        assert grads.abs().max() > 1e-3


def count(worker: Worker, root: Path) -> list[tuple[int, int, int, int]]:
    r"""Exchanges, messages, bytes and the bytes foretold: of a route, then exchanges and messages of each model's pass
    forwards and backwards."""
    share = GraphData.load_partition(root, worker.rank, worker.world_size, "random")
    route, x = share.to_route(worker.group), share.collect("x")
    found = []
    for types in (["a"], ["a", "b"], list(x)):
        meter.reset()
        route.apply({t: x[t] for t in types})
        foretold = sum(route.bytes_per_peer(dict.fromkeys(types, 8), torch.float64))
        found.append((meter.calls, meter.messages, meter.bytes_sent, foretold))
    for model in build(load("generated"), ours=True).values():
        meter.reset()
        out = model({t: rows.clone().requires_grad_() for t, rows in x.items()}, share.adj_dict(), route=route)
        out.sum().backward()
        found.append((meter.calls, meter.messages, 0, 0))
    return found


@pytest.mark.parametrize("num_parts", [2, 4])
def test_an_exchange_is_one_message_to_each_peer(gang: Gang, cut: Any, num_parts: int) -> None:
    for found in gang.run(count, num_parts, cut("generated", "random", num_parts)):
        for calls, messages, sent, foretold in found[:3]:
            assert (calls, messages) == (1, num_parts - 1)
            assert sent == foretold > 0
        for calls, messages, *_ in found[3:]:  # two layers, forwards and backwards
            assert calls == 4 and messages == calls * (num_parts - 1)


def one_type_case(worker: Worker, root: Path) -> tuple[Tensor, Tensor]:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, "random")
    torch.manual_seed(0)
    conv = nn.RGCNConv(8, 4, share.edge_types).double()
    x, route = share.collect("x"), share.to_route(worker.group)
    assert not isinstance(route, HeteroRoute)
    return share.node()["raw_ids"], conv(x, share.adj_dict(), route)["v"].detach()


def test_several_relations_of_one_type(gang: Gang, tmp_path: Path) -> None:
    r"""Then ``share.to_route()`` is the route of that type, and the layers take it."""
    draw, data = torch.Generator().manual_seed(0), HeteroData()
    data["v"].x = torch.randn(30, 8, generator=draw, dtype=torch.float64)
    for name in ("r", "s"):
        data["v", name, "v"].edge_index = torch.randint(30, (2, 90), generator=draw)
    GraphData.from_pyg_data(data).partition_graph(tmp_path, 3, algorithm="random")
    torch.manual_seed(0)
    plain = Joined(pyg.RGCNConv(8, 4, 2).double())
    torch.manual_seed(0)
    plain.conv.load_state_dict(nn.RGCNConv(8, 4, data.edge_types).double().state_dict())
    expected = plain(data.collect("x"), data.collect("edge_index"))["v"]
    for raw_ids, out in gang.run(one_type_case, 3, tmp_path):
        torch.testing.assert_close(out, expected[raw_ids], rtol=1e-10, atol=1e-10)
