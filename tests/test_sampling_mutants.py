r"""Mistakes put into sampling on purpose, which the comparisons of ``test_sampling_engine.py`` must notice; listed in
``MUTANTS.rst``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import directed_graph
from parts import parts_of
from test_sampling_engine import (
    KEY,
    OPTIONS,
    as_lists,
    edges_of,
    in_pygs_order,
    sample_batches,
    seeds_of,
    with_times,
)
from torch import Tensor

from partpar.graph import NODE, GraphData
from partpar.kernels import counter, relabel
from partpar.sampling import NeighborSampler
from partpar.sampling import found as found_nodes
from partpar.sampling import negative as negative_links
from partpar.serving import hop as hop_answers
from partpar.serving import owner

Patch = pytest.MonkeyPatch


def draw_by_local_id(patch: Patch) -> None:
    streams = hop_answers.sample.streams_of
    patch.setattr(
        hop_answers.sample,
        "streams_of",
        lambda key, raw_ids, rows: streams(key, torch.arange(99).numpy(), rows),
    )


def draw_by_part(patch: Patch) -> None:
    answer = owner.answer_hop

    def mutant(share: GraphData, request: hop_answers.HopRequest, *most: int) -> hop_answers.HopReply:
        return answer(share, replace(request, key=request.key ^ share.part_id), *most)

    patch.setattr(owner, "answer_hop", mutant)


def merge_in_order_of_owners(patch: Patch) -> None:
    merge = hop_answers.HopReply.merge

    def mutant(replies: Any, index: Any, num_rows: int) -> hop_answers.HopReply:
        starts = torch.tensor([0] + [at.numel() for at in index]).cumsum(0)
        return merge(
            replies, [torch.arange(a, a + at.numel()) for a, at in zip(starts, index, strict=False)], num_rows
        )

    patch.setattr(hop_answers.HopReply, "merge", staticmethod(mutant))


def order_edges_by_source(patch: Patch) -> None:
    gather = hop_answers.sample.gather

    def mutant(positions: Any, indices: Any, *columns: Any) -> Any:
        order = indices[positions].argsort(kind="stable") if len(positions) < 9 else slice(None)
        return gather(positions[order], indices, *columns)

    patch.setattr(hop_answers.sample, "gather", mutant)


def number_by_id(patch: Patch) -> None:
    r"""Seeds that are drawn alike, but nodes sorted by the ids of a partition."""
    cat = found_nodes.FoundNodes.advance

    def mutant(self: Any) -> None:
        for i in range(self._seen, len(self._ids)):
            order = self._ids[i].argsort()
            self._ids[i], self._raw_ids[i] = self._ids[i][order], self._raw_ids[i][order]
        cat(self)

    patch.setattr(found_nodes.FoundNodes, "advance", mutant)


def draw_negative_ids(patch: Patch) -> None:
    r"""Negatives are drawn among ids of the partition instead of raw ids."""
    draw = negative_links._Picker.draw

    def mutant(self: Any, end: int, which: Tensor, attempt: int, width: int) -> tuple[Tensor, Tensor]:
        _, ids = draw(self, end, which, attempt, width)
        raw = self.service.ids_of(
            self.types[end], torch.arange(int(self.service.offsets(self.types[end])[-1]))
        )
        return ids, raw.argsort()[ids]

    patch.setattr(negative_links._Picker, "draw", mutant)


def forget_batches(patch: Patch) -> None:
    key = counter.key
    patch.setattr(
        counter, "key", lambda seed, step, layer: key(seed, 0, 0) if layer < 99 else key(seed, 0, layer)
    )


def one_group(patch: Patch) -> None:
    r"""Trees of different seeds share their nodes."""
    number = relabel.number_neighbours
    patch.setattr(
        found_nodes,
        "number_neighbours",
        lambda t, k, i, c, groups, *rest: number(t, k, i, c, groups * 0, *rest),
    )


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (draw_by_local_id, "uniform"),
    (draw_by_part, "weighted"),
    (merge_in_order_of_owners, "uniform"),
    (order_edges_by_source, "replace"),
    (number_by_id, "uniform"),
    (draw_negative_ids, "uniform"),
]


@pytest.mark.parametrize(("mutate", "options"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_a_mutant_samples_otherwise_on_other_parts(
    mutate: Callable[[Patch], None], options: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    one, three = (parts_of(with_times("directed"), n, tmp_path) for n in (1, 3))
    assert sample_batches(one, OPTIONS[options]) == sample_batches(three, OPTIONS[options])
    mutate(monkeypatch)
    assert sample_batches(one, OPTIONS[options]) != sample_batches(three, OPTIONS[options])


def test_mutants_of_one_part_are_noticed(tmp_path: Path, monkeypatch: Patch) -> None:
    data = directed_graph()
    parts = parts_of(data, 1, tmp_path)
    seeds = {NODE: [5, 3, 57, 0]}

    def is_right() -> bool:
        out = NeighborSampler(parts, [-1, -1], disjoint=True).sample_nodes(
            {NODE: seeds_of(parts, NODE, torch.tensor(seeds[NODE]))}, KEY
        )
        return bool(
            as_lists(out)["raw_ids"] == in_pygs_order([NODE], edges_of(data), seeds, 2, True)["raw_ids"]
        )

    def batches_differ() -> bool:
        sampled = sample_batches(parts, {}, links=False)
        return len({str(one) for one in sampled}) == len(sampled)

    assert is_right()
    assert batches_differ()
    with Patch.context() as patch:
        one_group(patch)
        assert not is_right()
    with Patch.context() as patch:
        forget_batches(patch)
        assert not batches_differ()


def test_all_mutants_are_listed() -> None:
    listed = Path(__file__).with_name("MUTANTS.rst").read_text()
    mutants = [mutate for mutate, _ in MUTANTS] + [one_group, forget_batches]
    assert [mutate.__name__ for mutate in mutants if f"``{mutate.__name__}``" not in listed] == []
