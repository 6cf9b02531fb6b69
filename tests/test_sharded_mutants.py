r"""Mistakes put into sharded tensors on purpose, each of which the comparison with dense ones must notice; listed in
``MUTANTS.rst``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang, GangError, Worker
from sharded_cases import Call, Play, play_dense, play_sharded
from torch import Tensor

from partpar.exchange import RowsInFlight
from partpar.sharded import embedding, gradients, initializers, optim, swap, tensor, word

Patch = pytest.MonkeyPatch


def forget_own_rows(patch: Patch) -> None:
    r"""What a worker names of its own is neither fetched nor brought."""
    block = swap.Wanted.block
    patch.setattr(
        swap.Wanted, "block", lambda self, part: slice(0, 0) if part == self.rank else block(self, part)
    )


def swap_two_ids(patch: Patch) -> None:
    want = swap.want

    def mutant(shard: Any, ids: Tensor) -> Any:
        found = want(shard, ids)
        found.local[:2] = found.local[:2][::-1].copy()
        return found

    patch.setattr(swap, "want", mutant)


def forget_ids_that_follow(patch: Patch) -> None:
    r"""Where a word has no room for ids, those of other ranks are all taken for 0."""
    send = word.send_ids
    patch.setattr(word, "_MOST_ROOM", 0)
    patch.setattr(word, "send_ids", lambda *args: RowsInFlight(torch.zeros_like(send(*args).wait())))


def drop_the_last_rank(patch: Patch) -> None:
    r"""What the last rank brought is not added or written."""
    of = swap.Arrived.of
    patch.setattr(swap.Arrived, "of", lambda self, tensor: iter(list(of(self, tensor))[:-1]))


def first_write_stays(patch: Patch) -> None:
    put = tensor.put_rows

    def mutant(table: Any, rows: Any, values: Any, at: Any) -> int:
        return put(table, rows[::-1], values[::-1] if at is None else values[at[::-1]])

    patch.setattr(tensor, "put_rows", mutant)


def average_duplicates(patch: Patch) -> None:
    r"""As DGL does."""
    sums = gradients.Gradients.sums
    patch.setattr(gradients.Gradients, "sums", lambda self, some, out, scale, mean: sums(self, some, out, scale, True))


def keep_one_duplicate(patch: Patch) -> None:
    add = gradients.Gradients.add

    def one_of_each(brought: Any) -> Any:
        _, first = np.unique(brought.rows, return_index=True)
        return swap.Brought(brought.rows[first], brought.values, first if brought.at is None else brought.at[first])

    def mutant(self: Any, brought: Any) -> None:
        add(self, [one_of_each(some) for some in brought])

    patch.setattr(gradients.Gradients, "add", mutant)


def keep_the_trace(patch: Patch) -> None:
    r"""Gradients are noted twice, as if the step before had not taken them."""

    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.table.noted.extend([(ctx.wanted, grad)] * 2)
        return None, None, None, None

    patch.setattr(embedding._Noted, "backward", staticmethod(backward))


def one_lookup_a_step(patch: Patch) -> None:
    bring = optim.SparseOptimizer._bring

    def mutant(self: Any, tables: Any) -> Any:
        for table in tables:
            del table.noted[1:]
        return bring(self, tables)

    patch.setattr(optim.SparseOptimizer, "_bring", mutant)


def take_gradients_again(patch: Patch) -> None:
    r"""What a step took is there still when the next one comes."""
    bring = optim.SparseOptimizer._bring

    def mutant(self: Any, tables: Any) -> Any:
        noted = [list(table.noted) for table in tables]
        found = bring(self, tables)
        for table, some in zip(tables, noted, strict=True):
            table.noted.extend(some)
        return found

    patch.setattr(optim.SparseOptimizer, "_bring", mutant)


def count_no_steps(patch: Patch) -> None:
    r"""Adam's bias is always corrected as in the first step."""
    update = optim.SparseAdam._update

    def mutant(self: Any, i: int, found: Any) -> None:
        self.state[i]["step"].fill_(1)
        update(self, i, found)

    patch.setattr(optim.SparseAdam, "_update", mutant)


def draw_by_local_row(patch: Patch) -> None:
    fill = initializers._Drawn.fill
    patch.setattr(initializers._Drawn, "fill", lambda self, rows, first_id: fill(self, rows, 0))


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (forget_own_rows, "Adagrad"),
    (swap_two_ids, "SGD"),
    (forget_ids_that_follow, "SGD"),
    (drop_the_last_rank, "Adam"),
    (first_write_stays, "SGD"),
    (average_duplicates, "Adam"),
    (keep_one_duplicate, "Adagrad"),
    (keep_the_trace, "SGD"),
    (take_gradients_again, "SGD"),
    (one_lookup_a_step, "Adagrad"),
    (count_no_steps, "Adam"),
    (draw_by_local_row, "SGD"),
]
HANDS = ((3, 3, 0, 9), (3, 9, 4, 4), (), (9, 5, 3))
CALLS = (
    Call("set", HANDS, 7), Call("get", HANDS), Call("learn", HANDS, 1), Call("learn", HANDS[::-1], 2), Call("step", HANDS),
    Call("learn both", HANDS, 4), Call("step", HANDS), Call("learn", HANDS, 5), Call("step", HANDS), Call("look", HANDS),
)  # fmt: skip


def mutated(worker: Worker, optimiser: str, mutate: Callable[[Patch], None] | None) -> dict[str, Any]:
    with Patch.context() as patch:
        if mutate is not None:
            mutate(patch)
        return play_sharded(worker, Play(10, CALLS, optimiser))


def error(gang: Gang, optimiser: str, mutate: Callable[[Patch], None] | None) -> float:
    try:
        found = gang.run(mutated, 3, optimiser, mutate)[0]["ends"]
    except GangError:
        return float("inf")  # it was noticed before the end
    expected = play_dense(Play(10, CALLS, optimiser))["ends"]
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("optimiser", ["SGD", "Adagrad", "Adam"])
def test_without_a_mutant_all_agree(gang: Gang, optimiser: str) -> None:
    assert error(gang, optimiser, None) < 1e-12


@pytest.mark.parametrize(("mutate", "optimiser"), MUTANTS, ids=[mutate.__name__ for mutate, _ in MUTANTS])
def test_mutant_is_noticed(gang: Gang, mutate: Callable[[Patch], None], optimiser: str) -> None:
    assert error(gang, optimiser, mutate) > 1e-6


def test_all_are_listed() -> None:
    listed = Path(__file__).with_name("MUTANTS.rst").read_text()
    assert [mutate.__name__ for mutate, _ in MUTANTS if f"``{mutate.__name__}``" not in listed] == []
