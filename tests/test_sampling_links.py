r"""Links and negative links: found again among the nodes, drawn with their chances, no positives, not too late."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import directed_graph
from parts import parts_of, typed_graph
from test_sampling_engine import (
    KEY,
    seeds_of,
)
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.sampler import NegativeSampling

from partpar.errors import SamplingError
from partpar.graph import EDGE, NODE
from partpar.sampling import LinkSeeds, NeighborSampler, Seeds


def links_of(parts: Any, data: Data, edges: Tensor, **options: Any) -> LinkSeeds:
    src, dst = data.edge_index[:, edges]
    return LinkSeeds(EDGE, seeds_of(parts, NODE, src), seeds_of(parts, NODE, dst), **options)


@pytest.mark.parametrize("disjoint", [False, True])
def test_links_are_found_among_the_nodes(disjoint: bool, tmp_path: Path) -> None:
    data = directed_graph()
    parts = parts_of(data, 3, tmp_path)
    sampler = NeighborSampler(parts, [2, 2], disjoint=disjoint)
    edges = torch.arange(0, 200, 9)
    n = edges.numel()
    plain = sampler.sample_edges(links_of(parts, data, edges, label=edges), KEY)
    assert plain.labels is not None
    assert torch.equal(plain.raw_ids[NODE][plain.labels.edge_label_index], data.edge_index[:, edges])
    assert torch.equal(plain.labels.edge_label, edges)
    out = sampler.sample_edges(links_of(parts, data, edges), KEY, NegativeSampling("binary", 2))
    assert out.labels is not None
    assert torch.equal(out.raw_ids[NODE][out.labels.edge_label_index[:, :n]], data.edge_index[:, edges])
    assert out.labels.edge_label.tolist() == [1.0] * n + [0.0] * 2 * n
    triplets = sampler.sample_edges(links_of(parts, data, edges), KEY, NegativeSampling("triplet", 3)).labels
    assert triplets is not None
    assert triplets.dst_neg_index.shape == (n, 3)
    if disjoint:
        assert out.batch is not None
        of_links = out.batch[NODE][out.labels.edge_label_index]
        assert torch.equal(of_links, (torch.arange(3 * n) % n).expand(2, -1))
    one = sampler.sample_edges(links_of(parts, data, edges), KEY, NegativeSampling("triplet", 1)).labels
    assert one is not None
    assert one.dst_neg_index.shape == (n,)
    assert out.labels.metadata(edges)[1] is out.labels.edge_label_index
    assert triplets.metadata(None)[3] is triplets.dst_neg_index


@pytest.mark.parametrize("mode", ["binary", "triplet"])
def test_strict_negatives_are_no_edges(mode: str, tmp_path: Path) -> None:
    r"""On a graph so dense that most pairs are edges."""
    draws = torch.Generator().manual_seed(0)
    dense = (torch.rand(30, 30, generator=draws) < 0.9).nonzero().t()
    data = Data(edge_index=dense, num_nodes=30)
    parts = parts_of(data, 2, tmp_path)
    edges = torch.randperm(dense.size(1), generator=draws)[:100]
    held_out = torch.randint(
        30, (2, 40), generator=draws
    )  # links that need not be edges are not drawn either
    links = LinkSeeds(
        EDGE,
        seeds_of(parts, NODE, torch.cat([dense[0, edges], held_out[0]])),
        seeds_of(parts, NODE, torch.cat([dense[1, edges], held_out[1]])),
    )
    positive = {*zip(*dense.tolist(), strict=True), *zip(*held_out.tolist(), strict=True)}
    sampler = NeighborSampler(parts, [1])
    drawn = {}
    for strict in (False, True):
        out = sampler.sample_edges(links, KEY, NegativeSampling(mode, 2), strict)
        labels, raw = out.labels, out.raw_ids[NODE]
        assert labels is not None
        if mode == "binary":
            pairs = raw[labels.edge_label_index[:, 140:]]
        else:
            pairs = torch.stack(
                [raw[labels.src_index].repeat_interleave(2), raw[labels.dst_neg_index].flatten()]
            )
        assert pairs.size(1) == 280
        drawn[strict] = set(zip(*pairs.tolist(), strict=True)) & positive
    assert drawn[True] == set()
    assert len(drawn[False]) > 100
    complete = Data(edge_index=torch.ones(4, 4).nonzero().t(), num_nodes=4)
    service = parts_of(complete, 1, tmp_path / "complete")
    with pytest.raises(SamplingError, match="too dense for strict_negatives"):
        NeighborSampler(service, [1]).sample_edges(
            links_of(service, complete, torch.arange(3)), KEY, NegativeSampling(mode), True
        )


def test_negatives_are_drawn_by_their_weights(tmp_path: Path) -> None:
    data = Data(edge_index=torch.tensor([[0], [1]]), num_nodes=5)
    parts = parts_of(data, 2, tmp_path)
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0, 4.0])
    links = links_of(parts, data, torch.zeros(2000, dtype=torch.int64))
    for weight, chances in ((None, torch.ones(5)), (weights, weights)):
        out = NeighborSampler(parts, [1]).sample_edges(
            links, KEY, NegativeSampling("binary", 2, src_weight=None, dst_weight=weight)
        )
        assert out.labels is not None
        src, dst = (
            torch.bincount(ids, minlength=5)
            for ids in out.raw_ids[NODE][out.labels.edge_label_index[:, 2000:]]
        )
        for counts, chance in ((src, torch.ones(5)), (dst, chances)):
            some = chance > 0
            expected = 4000 * chance / chance.sum()
            assert int(counts[~some].sum()) == 0
            chi_square = float(((counts - expected)[some] ** 2 / expected[some]).sum())
            freedom = int(some.sum()) - 1
            assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def test_negatives_are_no_later_than_their_link(tmp_path: Path) -> None:
    data = directed_graph()
    data.time = torch.arange(60)
    parts = parts_of(data, 2, tmp_path)
    edges = torch.arange(0, 270, 7)
    times = data.time[data.edge_index[:, edges]].max(0).values
    sampler = NeighborSampler(parts, [2], time_attr="time")
    for mode in ("binary", "triplet"):
        out = sampler.sample_edges(links_of(parts, data, edges, times=times), KEY, NegativeSampling(mode, 2))
        labels, raw = out.labels, out.raw_ids[NODE]
        assert labels is not None
        assert out.batch is not None
        if mode == "binary":
            negatives = raw[labels.edge_label_index[:, edges.numel() :]]
            assert bool((data.time[negatives] <= times.repeat(2)).all())
            assert torch.equal(labels.time, times.repeat(3))
        else:
            assert bool((data.time[raw[labels.dst_neg_index]] <= times[:, None]).all())
            assert torch.equal(labels.time, times)
        assert bool((data.time[raw] <= times[out.batch[NODE]]).all())


@pytest.mark.parametrize(
    ("change", "negatives", "message"),
    [
        ({"edge_type": ("author", "to", "book")}, None, "expected ends among"),
        ({"dst": Seeds(torch.arange(2), torch.arange(2))}, None, "expected 3 of dst"),
        ({"label": torch.ones(4)}, None, "expected 3 of label"),
        ({"times": torch.arange(3)}, None, "disjoint sub-graphs only"),
        ({"label": torch.ones(3)}, NegativeSampling("triplet"), "no labels for triplets"),
        ({}, NegativeSampling("binary", 1, torch.ones(3)), r"expected shape \[30\]"),
        ({}, NegativeSampling("binary", 1, -torch.ones(30)), "finite numbers of at least 0"),
    ],
)
def test_links_that_do_not_fit_are_named(
    change: dict[str, Any], negatives: NegativeSampling | None, message: str, tmp_path: Path
) -> None:
    parts = parts_of(typed_graph(), 1, tmp_path)
    ends = Seeds(torch.arange(3), torch.arange(3))
    links = replace(LinkSeeds(("author", "writes", "paper"), ends, ends), **change)
    with pytest.raises(SamplingError, match=message):
        NeighborSampler(parts, [2]).sample_edges(links, KEY, negatives)
