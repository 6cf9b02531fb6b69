r"""The route of a typed graph: the same rows as a route for each type, in one exchange; sub-routes; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang, Worker
from graphs import typed_graph
from test_hetero import cut
from torch import Tensor
from typed_models import load

from partpar import GraphData, HeteroRoute, Route
from partpar.errors import PartitionError
from partpar.exchange import meter
from partpar.graph.select import select_edges

assert cut  # the fixture


def rows_of(share: GraphData, **options: Any) -> dict[str, Tensor]:
    r"""Rows of several widths and dimensions that tell type and raw id."""
    shapes = {"a": (3,), "b": (2, 2), "c": (), "d": (5,)}
    return {
        t: (share.node(t)["raw_ids"].double() * 10 + i).view(-1, *[1] * len(shapes[t])).expand(-1, *shapes[t])
        * torch.ones((), **options)
        for i, t in enumerate(share.node_types)
    }


def moving(worker: Worker, root: Path, algorithm: str) -> None:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, algorithm)
    route = share.to_route(worker.group)
    assert isinstance(route, HeteroRoute) and list(route) == share.node_types
    assert isinstance(share.to_route(worker.group, node_type="b"), Route)

    # Every row is its owner's, and gradients come back summed: as one type by itself, in one exchange each way.
    x = {t: rows.detach().requires_grad_() for t, rows in rows_of(share).items()}
    meter.reset()
    out = route.apply(x)
    assert meter.calls == (worker.world_size > 1)
    for i, (t, rows) in enumerate(out.items()):
        expected = share.node(t, "src")["raw_ids"].double() * 10 + i
        assert torch.equal(rows.flatten(1)[:, 0] if rows.dim() > 1 else rows, expected)
    weight = {t: torch.randn_like(rows) for t, rows in out.items()}
    sum((out[t] * weight[t]).sum() for t in out).backward(create_graph=True)
    for t in x:
        alone = x[t].detach().clone().requires_grad_()
        (route[t].apply(alone) * weight[t]).sum().backward()
        torch.testing.assert_close(x[t].grad, alone.grad)
        torch.testing.assert_close(x[t].grad, route[t].reduce(weight[t]))

    # In two phases, several in flight, some types only, integers.
    flights = [route.apply_begin({t: rows.detach()}) for t, rows in x.items()]
    for (t, rows), flight in zip(out.items(), flights, strict=True):
        assert torch.equal(flight.wait()[t], rows)
    integers = {t: share.node(t)["raw_ids"] for t in share.node_types}
    for t, rows in route.apply(integers).items():
        assert torch.equal(rows, share.node(t, "src")["raw_ids"])
    assert route.apply({}) == {}

    for op in ("sum", "mean", "max", "min"):
        for t, rows in route.reduce({t: rows.detach() for t, rows in out.items()}, op).items():
            torch.testing.assert_close(rows, route[t].reduce(out[t].detach(), op))
    narrow = route.with_policy(torch.bfloat16).apply({t: r.float().requires_grad_() for t, r in rows_of(share).items()})
    for t, rows in narrow.items():
        torch.testing.assert_close(rows.double(), out[t], rtol=2**-8, atol=0)

    # By relation: what travels is what the relation needs, and the share of that relation agrees.
    for relation in share.edge_types:
        part, thin = route.restrict([relation]), share.edge_type_subgraph([relation])
        needed = share.edge_index(relation)[0].unique()
        halo = int((needed >= share.num_owned(relation[0])).sum())
        assert {t: part[t].num_halo for t in part} == {t: halo if t == relation[0] else 0 for t in part}
        for t, own in thin.to_route(worker.group).items():
            assert torch.equal(own.raw_ids, part[t].raw_ids) and own.recv_splits == part[t].recv_splits
        source = thin.node(relation[0], "src")["raw_ids"][thin.edge_index(relation)[0]]
        assert torch.equal(source, share.node(relation[0], "src")["raw_ids"][share.edge_index(relation)[0]])
    masks = {"a": torch.zeros(route["a"].num_src, dtype=torch.bool)}
    none = route.restrict(masks)
    assert none["a"].num_src == 0 and none["b"].num_src == route["b"].num_src


@pytest.mark.filterwarnings("ignore:.*balance")
@pytest.mark.parametrize(("parts", "algorithm"), [(1, "metis"), (2, "given"), (4, "random")])
def test_rows_move_as_by_a_route_for_each_type(gang: Gang, cut: Any, parts: int, algorithm: str) -> None:
    gang.run(moving, parts, cut("generated", algorithm, parts), algorithm)


def wrong(worker: Worker, root: Path, kind: str) -> None:
    share = GraphData.load_partition(root, worker.rank, worker.world_size, "random")
    route, x = share.to_route(worker.group), rows_of(share)
    first = worker.rank == 0
    if kind == "tensor":
        route.apply(x["a"])
    elif kind == "type":
        route.apply({"e" if first else "a": x["a"]})
    elif kind == "dtype":
        route.apply({"a": x["a"], "b": x["b"].float() if first else x["b"]})
    elif kind == "rows":
        route.apply(x | {"a": x["a"][1:] if first else x["a"]})
    elif kind == "types":
        route.apply({"a": x["a"]} if first else {"a": x["a"], "b": x["b"]})
    elif kind == "relation":
        route.restrict([("a", "no", "b")])
    else:
        route.reduce(x, "median")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tensor", "expected rows by node type"),
        ("type", "expected node types of"),
        ("dtype", "expected rows of one dtype"),
        ("rows", "apply of 'a': expected"),
        ("types", "ranks"),
        ("relation", "expected edge types of the share"),
        ("median", "expected op to be one of"),
    ],
)
def test_what_is_wrong_raises_on_every_rank(gang: Gang, cut: Any, kind: str, message: str) -> None:
    for error in gang.run_expecting_errors(wrong, 2, cut("generated", "random", 2), kind):
        assert error is not None and message in error[1]


def test_alone() -> None:
    whole = GraphData.from_pyg_data(typed_graph())
    route, x = whole.to_route(), whole.collect("x")
    assert all(torch.equal(rows, x[t]) for t, rows in route.apply(x).items())
    same = HeteroRoute.trivial({t: rows.size(0) for t, rows in x.items()})
    assert all(torch.equal(rows, x[t]) for t, rows in same.reduce(x).items())
    small = HeteroRoute.trivial({"a": 2, "b": 3})
    assert repr(small) == "HeteroRoute(rank 0 of 1: a: 2 owned, 0 halo, 0 sent; b: 3 owned, 0 halo, 0 sent)"
    assert route.bytes_per_peer(3) == [0] and route.rank == 0 and route.world_size == 1
    halved = select_edges(whole, {e: torch.arange(whole.num_edges(e)) % 2 == 0 for e in whole.edge_types})
    assert halved.num_edges(("a", "aa", "a")) == (whole.num_edges(("a", "aa", "a")) + 1) // 2


def test_every_type_and_labelled_set_is_even(tmp_path: Path) -> None:
    graph = GraphData.from_pyg_data(load("dblp").data)
    path = graph.partition_graph(tmp_path, 4, ["#nodes:*", "train_mask:*"])
    report = json.loads((path / "manifest.json").read_text())["report"]
    for node_type, of_type in report["nodes"].items():
        if sum(of_type["owned"]) >= 100:
            assert of_type["balance"] <= 1.10, node_type
            assert of_type["balance"] == pytest.approx(max(of_type["owned"]) / np.mean(of_type["owned"]))
    assert report["balance"]["train_mask:author"] <= 1.10
    assert report["left_out"] == {"#nodes:conf": 20}
    assert {"edges", "cut_edges", "edge_cut", "balance"} <= set(report["edges"]["author__writes__paper"])
    plain = graph.partition_graph(tmp_path / "plain", 4)
    uneven = json.loads((plain / "manifest.json").read_text())["report"]["nodes"]
    assert max(uneven[t]["balance"] for t in ("author", "paper", "term")) > 1.10, "constraints did something"


def test_relations_weigh(tmp_path: Path) -> None:
    r"""A relation that weighs much is hardly cut; the cut of the others pays for it."""
    graph = GraphData.from_pyg_data(typed_graph())
    kept = {}
    for weight in (None, {("a", "aa", "a"): 1000, ("a", "ab", "b"): "t"}):
        path = graph.partition_graph(tmp_path, 2, "#nodes", edge_weight=weight, overwrite=True)
        manifest = json.loads((path / "manifest.json").read_text())
        kept[weight is None] = manifest["report"]["edges"]["a__aa__a"]["edge_cut"]
    assert kept[False] < kept[True]
    assert manifest["arguments"]["edge_weight"] == {"a__aa__a": 1000, "a__ab__b": "t"}
    for weight, message in (
        ({("a", "no", "a"): 2}, "expected edge types of"),
        ({("a", "aa", "a"): "u"}, r"expected an attribute of \('a', 'aa', 'a'\) \(\['t'\]\), found 'u'"),
    ):
        with pytest.raises(PartitionError, match=message):
            graph.partition_graph(tmp_path, 2, edge_weight=weight)
    with pytest.raises(PartitionError, match="of each by itself as NAME:"):
        graph.partition_graph(tmp_path, 2, "#nodes:e")
