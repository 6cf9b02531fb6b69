r"""Any two values of different axes meet in some combination, in far fewer than all."""

from __future__ import annotations

import itertools

import pytest
from pairs import pairwise, rank_cases

AXES = ((1, 2, 3, 4), ("a", "b", "c"), ("v", "w", "x", "y", "z"), (False, True))


@pytest.mark.parametrize("besides", [(), ((1, "a", "v", False), (2, "b", "v", True))])
def test_any_two_values_meet(besides: tuple[tuple, ...]) -> None:
    chosen = pairwise(*AXES, besides=besides)
    for (i, one), (j, other) in itertools.combinations(enumerate(AXES), 2):
        assert {(case[i], case[j]) for case in (*chosen, *besides)} == set(itertools.product(one, other))
    assert 20 - len(besides) <= len(chosen) < 30, "of 120"


def test_cuts_meet_on_several_ranks() -> None:
    core = [(1, "a", "v", True), (2, "a", "v", True)]
    cases = rank_cases(core, *AXES[1:])
    assert [case.values for case in cases[:2]] == core
    assert [case.marks[0].args for case in cases] == [(1,), (2,)] + [()] * (len(cases) - 2)
    several = {case.values[1:3] for case in cases if case.values[0] > 1}
    assert several == set(itertools.product(*AXES[1:3]))
    assert {case.values[2] for case in cases if case.values[0] == 1} == set(AXES[2])
    assert len({case.id for case in cases}) == len(cases)
