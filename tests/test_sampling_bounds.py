r"""What a sample keeps to: no edge or node later than its seed, one question a hop, and errors that name what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import directed_graph, npz_path
from parts import parts_of, typed_graph
from test_sampling_engine import KEY, seeds_of
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.sampler import NegativeSampling

from partpar.errors import SamplingError
from partpar.graph import EDGE, NODE
from partpar.sampling import BatchKey, LinkSeeds, NeighborSampler, Seeds
from partpar.serving import Service

# --- times ----------------------------------------------------------------------------------------------------------


def overflow(num_parts: int, folder: Path) -> tuple[Data, Service]:
    r"""Who answered or commented on whom, and when."""
    with np.load(npz_path("sx_mathoverflow"), allow_pickle=False) as file:
        src, dst, time = (torch.from_numpy(file[name]) for name in ("src", "dst", "t"))
        data = Data(edge_index=torch.stack([src, dst]), time=time, num_nodes=int(file["num_nodes"]))
    return data, parts_of(data, num_parts, folder)


@pytest.mark.parametrize(
    ("num_parts", "strategy"),
    [
        (2, "last"),
        pytest.param(1, "uniform", marks=pytest.mark.soak),
        pytest.param(4, "uniform", marks=pytest.mark.soak),
    ],
)
def test_no_real_edge_is_later_than_its_seed(num_parts: int, strategy: str, tmp_path: Path) -> None:
    data, parts = overflow(num_parts, tmp_path)
    sampler = NeighborSampler(parts, [8, 4], time_attr="time", temporal_strategy=strategy)
    events = torch.randperm(data.num_edges, generator=torch.Generator().manual_seed(0))[:400]
    order = torch.from_numpy(np.lexsort((data.time.numpy(), data.edge_index[1].numpy())))
    for batch, some in enumerate(events.split(100)):
        raw_ids, times = data.edge_index[1, some], data.time[some]
        out = sampler.sample_nodes({NODE: seeds_of(parts, NODE, raw_ids, times)}, BatchKey(batch=batch))
        assert out.batch is not None
        assert out.num_sampled_edges is not None
        edge = out.edge[EDGE]
        assert edge is not None
        assert bool((data.time[edge] <= times[out.batch[NODE][out.col[EDGE]]]).all())
        assert torch.equal(out.batch[NODE][out.row[EDGE]], out.batch[NODE][out.col[EDGE]])
        first = out.num_sampled_edges[EDGE][0]
        for i in range(some.numel()):
            drawn = edge[:first][out.col[EDGE][:first] == i]
            own = order[(data.edge_index[1, order] == raw_ids[i]) & (data.time[order] <= times[i])]
            if strategy == "last":
                assert drawn.tolist() == own[-8:].tolist()
            else:
                assert drawn.numel() == min(8, own.numel())
                assert set(drawn.tolist()) <= set(own.tolist())


def test_no_node_is_later_than_its_seed(tmp_path: Path) -> None:
    data = directed_graph()
    data.time = torch.arange(60) % 17
    parts = parts_of(data, 3, tmp_path)
    sampler = NeighborSampler(parts, [-1, -1], time_attr="time")
    raw_ids = torch.arange(20)
    out = sampler.sample_nodes({NODE: seeds_of(parts, NODE, raw_ids, data.time[raw_ids])}, KEY)
    assert out.batch is not None
    assert bool((data.time[out.raw_ids[NODE]] <= data.time[raw_ids][out.batch[NODE]]).all())
    late = data.time[data.edge_index[0]] > data.time[data.edge_index[1]]
    for i in raw_ids.tolist():  # and nothing else is left out
        first = (data.edge_index[1] == i) & ~late
        assert set(data.edge_index[0, first].tolist()) <= set(
            out.raw_ids[NODE][out.batch[NODE] == i].tolist()
        )


# --- odd cases ------------------------------------------------------------------------------------------------------


def count_questions(parts: Service, patch: pytest.MonkeyPatch) -> list[int]:
    r"""How many edge types each hop asks for, as it is asked."""
    asked: list[int] = []
    begin = parts.hop_begin

    def counted(requests: Any) -> Any:
        asked.append(len(requests))
        return begin(requests)

    patch.setattr(parts, "hop_begin", counted)
    return asked


def test_no_seeds_and_no_hops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(typed_graph(), 2, tmp_path)
    asked = count_questions(parts, monkeypatch)
    none = torch.empty(0, dtype=torch.int64)
    for seeds in ({}, {"paper": Seeds(none, none)}):
        out = NeighborSampler(parts, [2, 2]).sample_nodes(seeds, KEY)
        assert all(ids.numel() == 0 for ids in out.ids.values())
        assert out.num_sampled_nodes == {t: [0, 0, 0] for t in parts.node_types}
        assert out.num_sampled_edges == {t: [0, 0] for t in parts.edge_types}
    assert asked == []
    out = NeighborSampler(parts, []).sample_nodes({"paper": seeds_of(parts, "paper", torch.arange(3))}, KEY)
    assert out.raw_ids["paper"].tolist() == [0, 1, 2]
    links = LinkSeeds(("author", "writes", "paper"), Seeds(none, none), Seeds(none, none))
    for negatives in (NegativeSampling("binary"), NegativeSampling("triplet", 2)):
        out = NeighborSampler(parts, [2], disjoint=True).sample_edges(links, KEY, negatives)
        assert out.row["author", "writes", "paper"].numel() == 0


def test_one_question_a_hop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(typed_graph(), 3, tmp_path)
    asked = count_questions(parts, monkeypatch)
    NeighborSampler(parts, [2, 2, 2]).sample_nodes({"paper": seeds_of(parts, "paper", torch.arange(9))}, KEY)
    assert len(asked) == 3
    assert asked[0] == 2  # edge types that lead to papers


@pytest.mark.parametrize(
    ("options", "seeds", "message"),
    [
        ({"num_neighbors": {EDGE: [1]}}, None, "num_neighbors: .*expected a list for each"),
        ({"num_neighbors": [2, -3]}, None, "integers of at least -1, found"),
        ({"num_neighbors": [2.5]}, None, "integers of at least -1, found"),
        ({"temporal_strategy": "first"}, None, "temporal strategy of"),
        ({"time_attr": "time"}, {"paper": torch.arange(2)}, "expected a time for each"),
        ({}, {"book": torch.arange(2)}, "expected node types of"),
        ({}, {"paper": torch.tensor([50])}, "expected ids from 0 to 49, found 50"),
        ({}, {"paper": torch.tensor([0.5])}, "expected int64 of shape"),
    ],
)
def test_what_does_not_fit_is_named(
    options: dict[str, Any], seeds: dict[str, Tensor] | None, message: str, tmp_path: Path
) -> None:
    parts = parts_of(typed_graph(), 1, tmp_path)
    with pytest.raises(SamplingError, match=message):
        NeighborSampler(parts, **{"num_neighbors": [2], **options}).sample_nodes(
            {t: Seeds(ids, ids) for t, ids in (seeds or {}).items()}, KEY
        )
