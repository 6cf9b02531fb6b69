r"""Which combinations of many axes a test runs, where all of them would take hours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["pairwise", "rank_cases"]

Case = tuple[Any, ...]


def pairwise(*axes: Sequence[Any], besides: Iterable[Case] = ()) -> list[Case]:
    r"""Few combinations of one value of each axis in which any two values of different axes meet: nearly all mistakes
    need no more than two values to be seen (Kuhn, Wallace and Gallo, IEEE TSE 30(6), 2004).

    The greedy choice of Cohen et al. (AETG, IEEE TSE 23(7), 1997) among all combinations; of equally good ones the first.

    Args:
        besides: Combinations that are run anyway, and are not among those returned.
    """
    everything = list(itertools.product(*axes))
    missing = set().union(*map(_pairs, everything)).difference(*map(_pairs, besides))
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(_pairs(case) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[Case]:
    return set(itertools.combinations(enumerate(case), 2))


def rank_cases(core: Sequence[Case], *axes: Sequence[Any]) -> list[Any]:
    r"""Parameters of a test, of which the first is ``world_size``: those of the core, and among the soak tests what is
    needed for any two values to meet on several ranks, and each value of an axis to be on one rank, where no graph is
    cut."""
    several = pairwise((2, 3, 4), *axes, besides=[case for case in core if case[0] > 1])
    alone = [(1, *(axis[i % len(axis)] for axis in axes)) for i in range(max(map(len, axes)))]

    def named(case: Case) -> Any:
        ranks = case[:1] if case in core else ()
        return pytest.param(*case, id="-".join([f"{case[0]}ranks", *map(str, case[1:])]), marks=pytest.mark.core_on(*ranks))

    return [named(case) for case in dict.fromkeys([*core, *alone, *several])]
