r"""One hop: what may be drawn is drawn, nothing else, each with its chance, and by whom or when does not matter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from graphs import directed_graph
from parts import parts_of, shares_of
from torch import Tensor
from torch_geometric.data import Data

from partpar import GraphData
from partpar.errors import SamplingError
from partpar.graph import EDGE
from partpar.kernels.ragged import interleave
from partpar.serving.hop import HopReply, HopRequest, answer_hop

MANY = 30_000  # destinations that are drawn for in one test of chances


def fans(degree: int, num_dst: int = MANY, **attributes: Tensor) -> GraphData:
    r"""``num_dst`` destinations behind as many sources as one needs, each with an edge from the sources ``0, 1, …``;
    attributes of one destination's edges are those of all."""
    dst = torch.arange(num_dst).repeat_interleave(degree)
    src = torch.arange(degree).repeat(num_dst)
    repeated = {name: value.repeat(num_dst) for name, value in attributes.items()}
    return GraphData.from_pyg_data(
        Data(edge_index=torch.stack([src, dst]), num_nodes=max(num_dst, degree), **repeated)
    )


def draw(
    graph: GraphData, fanout: int, key: int = 7, rows: Tensor | None = None, **options: object
) -> HopReply:
    rows = torch.arange(graph.num_nodes()) if rows is None else rows
    return answer_hop(graph, HopRequest(EDGE, rows, fanout, key, **options))  # type: ignore[arg-type]


def chi_square_is_small(counts: Tensor, chances: Tensor) -> bool:
    r"""Within six deviations of its mean."""
    expected = chances.double() / chances.sum() * counts.sum()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5


def sets(reply: HopReply, fanout: int, degree: int) -> Tensor:
    r"""How often each set of neighbours was drawn."""
    picked = reply.ids.view(-1, fanout).sort(1).values
    names = {pick: i for i, pick in enumerate(itertools.combinations(range(degree), fanout))}
    code = torch.tensor([names[tuple(pick)] for pick in picked.unique(dim=0).tolist()])
    return torch.zeros(len(names), dtype=torch.int64).scatter_(
        0, code, picked.unique(dim=0, return_counts=True)[1]
    )


# --- chances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degree", "fanout"), [(6, 2), (7, 1), (7, 3), (5, 4)])
def test_without_replacement_all_sets_are_alike(degree: int, fanout: int) -> None:
    counts = sets(draw(fans(degree), fanout), fanout, degree)
    assert chi_square_is_small(counts, torch.ones(counts.numel()))


def test_many_of_many_are_alike() -> None:
    r"""More than are looked through one by one."""
    picked = draw(fans(100, 3000), 40).ids
    assert chi_square_is_small(torch.bincount(picked, minlength=100) / (1 - 0.4), torch.ones(100))


def test_with_replacement_all_sequences_are_alike() -> None:
    picked = draw(fans(5), 2, replace=True).ids.view(-1, 2)
    assert chi_square_is_small(torch.bincount(picked[:, 0] * 5 + picked[:, 1], minlength=25), torch.ones(25))


WEIGHTS = torch.tensor([0.5, 4.0, 1.0, 0.0, 2.5])


def test_weighted_with_replacement() -> None:
    picked = draw(fans(5, w=WEIGHTS), 2, replace=True, weight_attr="w").ids.view(-1, 2)
    some = WEIGHTS > 0
    chances = torch.outer(WEIGHTS, WEIGHTS)[some][:, some].flatten()
    counts = torch.bincount(picked[:, 0] * 5 + picked[:, 1], minlength=25).view(5, 5)
    assert int(counts[~some].sum()) == int(counts[:, ~some].sum()) == 0
    assert chi_square_is_small(counts[some][:, some].flatten(), chances)


@pytest.mark.parametrize("fanout", [1, 2, 3])
def test_weighted_without_replacement_is_one_draw_after_the_other(fanout: int) -> None:
    counts = sets(draw(fans(5, w=WEIGHTS), fanout, weight_attr="w"), fanout, 5)
    total = float(WEIGHTS.sum())

    def chance(order: tuple[int, ...]) -> float:
        left, product = total, 1.0
        for i in order:
            product *= float(WEIGHTS[i]) / left
            left -= float(WEIGHTS[i])
        return product

    chances = torch.tensor(
        [sum(map(chance, itertools.permutations(pick))) for pick in itertools.combinations(range(5), fanout)]
    )
    assert int(counts[chances == 0].sum()) == 0
    assert chi_square_is_small(counts[chances > 0], chances[chances > 0])


def test_what_weighs_nothing_is_taken_only_with_all() -> None:
    graph = fans(5, 3, w=torch.tensor([0, 0, 1, 0, 2]))
    assert draw(graph, 4, rows=torch.arange(3), weight_attr="w").counts.tolist() == [2, 2, 2]
    assert draw(graph, -1, rows=torch.arange(3), weight_attr="w").counts.tolist() == [5, 5, 5]
    nothing = fans(5, 3, w=torch.zeros(5))
    for replace in (False, True):
        reply = draw(nothing, 4, rows=torch.arange(3), weight_attr="w", replace=replace)
        assert reply.counts.tolist() == [0, 0, 0]


# --- what is drawn --------------------------------------------------------------------------------------------------


def in_edges(data: Data, node: int) -> list[int]:
    return (data.edge_index[1] == node).nonzero().flatten().tolist()


@pytest.mark.parametrize("weight", [None, "edge_weight"])
@pytest.mark.parametrize("fanout", [0, 1, 3, 5, 40, -1])
def test_no_edge_twice_and_all_where_there_are_few(tmp_path: Path, fanout: int, weight: str | None) -> None:
    data = directed_graph()
    parts = parts_of(data, 3, tmp_path)
    raw_ids = torch.arange(60)
    request = HopRequest(EDGE, parts.ids_of("node", raw_ids), fanout, 1, weight_attr=weight)
    reply = parts.hop_begin({EDGE: request}).wait()[EDGE]
    for node, edges in zip(raw_ids.tolist(), reply.edge_ids.split(reply.counts.tolist()), strict=True):
        own = in_edges(data, node)
        assert (
            len(set(edges.tolist())) == edges.numel() == (len(own) if fanout < 0 else min(fanout, len(own)))
        )
        assert set(edges.tolist()) <= set(own)
        if edges.numel() == len(own):
            assert edges.tolist() == own
    assert torch.equal(data.edge_index[0][reply.edge_ids], reply.raw_ids)
    assert torch.equal(parts.ids_of("node", reply.raw_ids), reply.ids)


def test_replacement_draws_as_many_wherever_there_is_any() -> None:
    graph = GraphData.from_pyg_data(Data(edge_index=torch.tensor([[0, 1, 2], [1, 1, 2]]), num_nodes=3))
    reply = draw(graph, 4, replace=True)
    assert reply.counts.tolist() == [0, 4, 4]
    assert set(reply.edge_ids[4:].tolist()) == {2}


@pytest.mark.parametrize(
    "options", [{}, {"replace": True}, {"weight_attr": "w"}, {"weight_attr": "w", "replace": True}]
)
def test_a_row_is_drawn_alike_in_any_company(options: dict[str, object]) -> None:
    graph = fans(9, 500, w=torch.arange(1.0, 10.0))
    rows = torch.arange(500)
    whole = draw(graph, 4, rows=rows, **options).ids.view(-1, 4)
    some = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:200]
    assert torch.equal(draw(graph, 4, rows=some, **options).ids.view(-1, 4), whole[some])
    assert not torch.equal(draw(graph, 4, key=8, rows=rows, **options).ids.view(-1, 4), whole)
    for_seeds = draw(graph, 4, rows=rows, disjoint_ids=rows % 2, **options).ids.view(-1, 4)
    again = draw(graph, 4, rows=rows, disjoint_ids=rows * 0 + 1, **options).ids.view(-1, 4)
    assert torch.equal(for_seeds[1::2], again[1::2])
    assert not torch.equal(for_seeds[::2], again[::2])


def test_edge_rows_say_where_attributes_stand(tmp_path: Path) -> None:
    data = directed_graph()
    parts = parts_of(data, 3, tmp_path)
    request = HopRequest(EDGE, torch.arange(60), 2, 1, with_edge_rows=True)
    reply = parts.hop_begin({EDGE: request}).wait()[EDGE]
    assert reply.edge_rows is not None
    weights = parts.edge_rows(EDGE, "edge_weight", reply.edge_rows)
    assert torch.equal(weights, data.edge_weight[reply.edge_ids])


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["node", "edge"])
@pytest.mark.parametrize("strategy", ["uniform", "last"])
@pytest.mark.parametrize("fanout", [1, 3, -1])
def test_nothing_later_is_drawn(tmp_path: Path, side: str, strategy: str, fanout: int) -> None:
    data = directed_graph()
    draws = torch.Generator().manual_seed(1)
    data.time = torch.randint(20, (60 if side == "node" else 275,), generator=draws)
    times = torch.randint(20, (60,), generator=draws)
    parts = parts_of(data, 2, tmp_path)
    raw_ids = torch.arange(60)
    reply = parts.hop_begin(
        {
            EDGE: HopRequest(
                EDGE,
                parts.ids_of("node", raw_ids),
                fanout,
                1,
                time_attr="time",
                temporal_strategy=strategy,
                times=times,
            )
        }
    ).wait()[EDGE]
    edge_time = data.time[data.edge_index[0]] if side == "node" else data.time
    for node, edges in zip(raw_ids.tolist(), reply.edge_ids.split(reply.counts.tolist()), strict=True):
        own = [e for e in in_edges(data, node) if edge_time[e] <= times[node]]
        own.sort(key=lambda e: int(edge_time[e]))  # stable: of one time in the order of raw ids
        assert (
            len(set(edges.tolist())) == edges.numel() == (len(own) if fanout < 0 else min(fanout, len(own)))
        )
        assert set(edges.tolist()) <= set(own)
        if strategy == "last" and fanout > 0:
            assert edges.tolist() == own[-fanout:]


def test_times_and_weights_together() -> None:
    graph = fans(6, w=torch.tensor([1.0, 1, 2, 3, 9, 9]), time=torch.tensor([0, 0, 1, 1, 2, 2]))
    times = torch.ones(MANY, dtype=torch.int64)
    counts = torch.bincount(draw(graph, 1, weight_attr="w", time_attr="time", times=times).ids, minlength=6)
    assert counts[4:].tolist() == [0, 0]
    assert chi_square_is_small(counts[:4], torch.tensor([1.0, 1, 2, 3]))


# --- messages -------------------------------------------------------------------------------------------------------


def test_ragged_rows_come_into_order() -> None:
    pieces = [[torch.tensor([1, 2, 3])], [torch.tensor([4])], [torch.empty(0, dtype=torch.int64)]]
    counts = [torch.tensor([2, 0, 1]), torch.tensor([1]), torch.empty(0, dtype=torch.int64)]
    index = [torch.tensor([3, 0, 1]), torch.tensor([2]), torch.empty(0, dtype=torch.int64)]
    (column,), lengths = interleave(pieces, counts, index, 4)
    assert column.tolist() == [3, 4, 1, 2]
    assert lengths.tolist() == [0, 1, 1, 2]


def test_requests_survive_the_wire() -> None:
    whole = HopRequest(
        EDGE, torch.arange(3), -1, 2**64 - 1, True, "w", "t", "last", torch.arange(3), torch.ones(3)
    )
    tensors, values = whole.to_wire()
    assert all(isinstance(value, str | int | bool | list) for value in values.values())
    back = HopRequest.from_wire(tensors, values)
    assert back.edge_type == EDGE
    assert back == HopRequest(**{**values, **tensors, "edge_type": EDGE})
    with pytest.raises(SamplingError, match="strange"):
        HopRequest.from_wire(tensors, {**values, "strange": 1})
    with pytest.raises(SamplingError, match="expected all"):
        HopRequest.from_wire({}, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_type": ("a", "b", "c")}, "expected an edge type of"),
        ({"ids": torch.tensor([0, 60])}, r"part 0 owns ids 0 to 59.*found 1 others, the first 60"),
        ({"ids": torch.tensor([-1])}, "the first -1"),
        ({"ids": torch.tensor([1.0])}, r"ids: expected int64 of shape \[1\], found torch.float32"),
        ({"fanout": -2}, "fan-out of at least -1"),
        ({"temporal_strategy": "first"}, "temporal strategy of"),
        ({"weight_attr": "nothing"}, "found none called 'nothing'"),
        ({"weight_attr": "edge_attr"}, "expected one number each"),
        ({"weight_attr": "wrong"}, "expected finite numbers of at least 0"),
        ({"time_attr": "nothing"}, "found none called 'nothing'"),
        (
            {"time_attr": "edge_weight", "times": torch.zeros(2, dtype=torch.int64)},
            "expected one integer each",
        ),
        ({"time_attr": "time"}, "expected a time for each row"),
        (
            {"time_attr": "time", "times": torch.zeros(3, dtype=torch.int64)},
            r"times: expected int64 of shape \[2\]",
        ),
        ({"disjoint_ids": torch.zeros(1, dtype=torch.int64)}, "disjoint_ids: expected"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    data = directed_graph()
    order = data.edge_index[1].argsort(stable=True)
    data.edge_index, data.time = data.edge_index[:, order], torch.arange(275)
    data.wrong = torch.where(torch.arange(275) == 9, float("nan"), 1.0)
    request = HopRequest(**{"edge_type": EDGE, "ids": torch.arange(2), "fanout": 2, "key": 1, **change})  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match=message):
        answer_hop(GraphData.from_pyg_data(data), request)


def test_weights_and_times_that_were_changed_are_read_again(tmp_path: Path) -> None:
    data = directed_graph()
    data.time, data.weight = torch.zeros(275, dtype=torch.int64), torch.ones(275, dtype=torch.int64)
    parts = parts_of(data, 2, tmp_path)
    ids = torch.arange(60)
    request = HopRequest(EDGE, ids, 2, 1, weight_attr="weight", time_attr="time", times=torch.zeros_like(ids))
    assert parts.hop_begin({EDGE: request}).wait()[EDGE].ids.numel() > 0
    edges = parts.ids_of(EDGE, torch.arange(275))
    for name, value in (("time", 1), ("weight", 0)):
        before = parts.edge_rows(EDGE, name, edges)
        parts.put(EDGE, name, edges, torch.full((275,), value))
        assert parts.hop_begin({EDGE: request}).wait()[EDGE].ids.numel() == 0
        parts.put(EDGE, name, edges, before)
        assert parts.hop_begin({EDGE: request}).wait()[EDGE].ids.numel() > 0


def test_times_of_the_halo_are_asked_for(tmp_path: Path) -> None:
    data = directed_graph()
    data.time = torch.arange(60)
    shares = shares_of(data, 2, tmp_path)
    request = HopRequest(
        EDGE, torch.arange(2), 2, 1, time_attr="time", times=torch.zeros(2, dtype=torch.int64)
    )
    with pytest.raises(SamplingError, match="for the halo of type 'node' as well"):
        answer_hop(shares[0], request)


def test_the_table_of_a_share_goes_with_it() -> None:
    from partpar.serving import hop

    before = len(hop._kept)
    graph = fans(3, 10)
    draw(graph, 2)
    assert len(hop._kept) == before + 1
    del graph
    assert len(hop._kept) == before
