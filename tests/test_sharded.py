r"""Sharded tensors and embeddings against dense ones: any sequence of calls, on any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from gang import Gang, Worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharded_cases import OPTIMISERS, Call, Play, play_dense, play_sharded
from torch import Tensor

from partpar.sharded import (
    Constant,
    DistEmbedding,
    DistTensor,
    Normal,
    SparseSGD,
    Uniform,
    edge_split,
    lookup,
    node_split,
    xavier_uniform,
)

KINDS = ("get", "set", "look", "learn", "learn both", "step")


@st.composite
def plays(draw: Any) -> Play:
    rows = draw(st.integers(1, 24))
    hands = st.lists(st.lists(st.integers(0, rows - 1), max_size=6).map(tuple), min_size=4, max_size=4).map(tuple)
    call = st.builds(
        Call, st.sampled_from(KINDS), hands, seed=st.integers(0, 10**6), table=st.integers(0, 1)
    )
    calls = draw(st.lists(call, min_size=1, max_size=8))
    cuts = draw(st.one_of(st.just(()), st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=3, max_size=3)))
    return Play(rows, tuple(calls), draw(st.sampled_from(sorted(OPTIMISERS))), tuple(cuts))


def compare(gang: Gang, world_size: int, play: Play) -> None:
    found, expected = gang.run(play_sharded, world_size, play), play_dense(play)
    for number, told in enumerate(expected["told"]):
        error = difference(torch.cat([rank["told"][number] for rank in found]), told)
        assert error < 1e-12, f"call {number}"
    for ours, theirs in zip(found[0]["ends"], expected["ends"], strict=True):
        assert difference(ours, theirs) < 1e-12


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


def examples(number: int) -> Any:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=checks)


@pytest.mark.core_on(2, 3)
@given(play=plays())
@examples(10)
def test_any_sequence_equals_the_dense_one(gang: Gang, world_size: int, play: Play) -> None:
    compare(gang, world_size, play)


@pytest.mark.soak
@given(play=plays())
@examples(100)
def test_many_sequences_equal_the_dense_one(gang: Gang, world_size: int, play: Play) -> None:
    compare(gang, world_size, play)


@pytest.mark.core_on(3)
@pytest.mark.parametrize("optimiser", sorted(OPTIMISERS))
def test_duplicates_within_and_across_ranks_are_summed(gang: Gang, world_size: int, optimiser: str) -> None:
    r"""Several lookups a step, one id in all hands, an empty hand, and a table that only some steps reach."""
    hands = ((3, 3, 0), (3, 9, 9, 9), (), (9, 3))
    calls = [Call("learn", hands, 1), Call("learn", hands[::-1], 2), Call("learn", hands, 3, table=1), Call("step", hands)]
    calls += [Call("learn both", hands, 4), Call("step", hands), Call("step", hands), Call("learn", ((),) * 4), Call("step", hands)]
    compare(gang, world_size, Play(10, tuple(calls), optimiser, (0.0, 0.5, 0.5)))


# --- not only exact where sums are: the same bits ------------------------------------------------------------


def train_float32(worker: Worker, optimiser: str) -> Tensor:
    table = DistEmbedding(50, 7, "e", Normal(seed=1))
    steps = OPTIMISERS[optimiser]([table], lr=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        for _ in range(2):
            ids, grad = torch.randint(50, (120,), generator=draw), torch.randn(120, 7, generator=draw)
            each = 120 // worker.world_size
            own = slice(worker.rank * each, (worker.rank + 1) * each)
            table(ids[own]).backward(grad[own])
        steps.step()
    return table(torch.arange(50)).detach()


@pytest.mark.core_on(2)
@pytest.mark.parametrize("optimiser", sorted(OPTIMISERS))
def test_the_same_bits_for_any_number_of_workers(gang: Gang, world_size: int, optimiser: str) -> None:
    alone = gang.run(train_float32, 1, optimiser)[0]
    for found in gang.run(train_float32, world_size, optimiser):
        assert torch.equal(found, alone)


def first_values(worker: Worker) -> list[Tensor]:
    inits = (Uniform(-1, 2, seed=4), Normal(1, 3, seed=4), Constant(7), xavier_uniform(301, 5), None)
    made = [DistTensor((301, 5), dtype, None, init) for init in inits for dtype in (torch.float32, torch.bfloat16)]
    return [t[torch.arange(301)] for t in made]


def test_first_values_do_not_depend_on_the_number_of_workers(gang: Gang) -> None:
    alone = gang.run(first_values, 1)[0]
    for ours, theirs in zip(gang.run(first_values, 3)[1], alone, strict=True):
        assert torch.equal(ours, theirs)
    uniform, normal = alone[0], alone[2]
    assert -1 <= uniform.min() < -0.9 < 1.9 < uniform.max() < 2
    assert abs(float(normal.mean()) - 1) < 0.25
    assert abs(float(normal.std()) - 3) < 0.25
    assert len(uniform.unique()) > 1400, "rows and columns differ"


# --- tensors of every kind -----------------------------------------------------------------------------------


def every_dtype(worker: Worker) -> None:
    whole = torch.arange(11 * 3).view(11, 3)
    ids = torch.tensor([10, 0, 4, 4])
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int64, torch.bool):
        for shape in ((11,), (11, 3), (11, 1, 3)):
            rows = (whole if len(shape) > 1 else whole[:, 0]).reshape(shape).to(dtype)
            t = DistTensor(shape, dtype)
            t.local_rows[:] = rows[t.local_ids]
            assert torch.equal(t[ids], rows[ids])
            flights = [t.gather_begin(ids + k) for k in (0, -0)]
            assert all(torch.equal(flight.wait(), rows[ids]) for flight in flights)
            t[ids[:2].int()] = rows[[3, 5]]
            assert torch.equal(t[[10, 0]], rows[[3, 5]])
            t[torch.tensor([2])[worker.rank :]] = 1
            assert bool((t[[2]] == torch.ones((), dtype=dtype)).all())
    assert len(DistTensor((0, 4))) == 0
    assert DistTensor((0, 4))[torch.empty(0, dtype=torch.int64)].shape == (0, 4)


@pytest.mark.core_on(2)
def test_every_dtype_and_shape_moves(gang: Gang, world_size: int) -> None:
    gang.run(every_dtype, world_size)


def some_and_many(worker: Worker) -> None:
    t = DistTensor((50_000,), torch.int64)
    t.local_rows[:] = t.local_ids
    for sizes in ((3, 0), (4, 900), (40_000, 1), (40_000, 40_000), (0, 0), (1000, 5), (1000, 5), (5, 1000)):
        ids = torch.arange(49_999, 49_999 - sizes[worker.rank % 2], -1)
        assert torch.equal(t[ids], ids)
        t[ids[:50]] = ids[:50]


def test_requests_of_every_length_follow_each_other(gang: Gang) -> None:
    r"""Room for ids is made by what was needed before."""
    gang.run(some_and_many, 3)


def by_raw_id(worker: Worker) -> Tensor:
    raw_ids = torch.randperm(40, generator=torch.Generator().manual_seed(worker.world_size))
    t = DistTensor((40, 3))
    u = DistTensor((40, 3), init_func=Normal(seed=1).of(raw_ids[t.local_ids]))
    return u[raw_ids.argsort()]


def test_first_values_go_by_raw_id_where_asked(gang: Gang) -> None:
    alone = DistTensor((40, 3), init_func=Normal(seed=1)).local_rows
    for found in gang.run(by_raw_id, 3):
        assert torch.equal(found, alone)


def own_function(worker: Worker) -> tuple[Tensor, Tensor]:
    before = torch.get_rng_state()
    made = DistTensor((8, 2), torch.float64, "drawn", lambda shape, dtype: torch.randn(shape, dtype=dtype))
    assert torch.equal(torch.get_rng_state(), before)
    return made[torch.arange(8)], DistTensor((8, 2), torch.float64, "drawn")[torch.arange(8)]


def test_own_init_functions_run_at_the_owner_with_a_seed_of_each_shard(gang: Gang) -> None:
    first, again = gang.run(own_function, 2), gang.run(own_function, 2)
    assert torch.equal(first[0][0], again[1][0])
    assert torch.equal(first[0][0], first[0][1]), "the same name is the same rows"
    assert len(first[0][0].unique()) == 16, "shards differ"


def names(worker: Worker) -> tuple[int, int]:
    t = DistTensor((4, 1), name="kept", persistent=True)
    t.local_rows.fill_(3)
    DistTensor((4, 1), name="gone").local_rows.fill_(3)
    del t
    kept, gone = DistTensor.attach("kept"), DistTensor((4, 2), name="gone")
    return int(kept[[3]]), int(gone[[3]].sum())


def test_persistent_rows_stay_under_their_name(gang: Gang) -> None:
    assert gang.run(names, 2) == [(3, 0)] * 2


# --- the trace holds one step --------------------------------------------------------------------------------


def trace(worker: Worker) -> list[int]:
    table = DistEmbedding(10, 2, "e")
    table(torch.arange(10)).sum().backward()  # no optimiser would ever take this
    assert not table.noted
    optimiser, told = SparseSGD([table]), []
    for _ in range(5):
        table(torch.arange(10))  # nobody asks for gradients of these
        table(torch.arange(10)).sum().backward()
        told.append(len(table.noted))
        optimiser.step()
        told.append(len(table.noted))
    with torch.no_grad():
        assert not table(torch.arange(3)).requires_grad
    table(torch.arange(3)).sum().backward()
    optimiser.zero_grad()
    return [*told, len(table.noted)]


def test_the_trace_holds_no_more_than_the_step(gang: Gang) -> None:
    assert gang.run(trace, 2) == [[1, 0] * 5 + [0]] * 2


def scaled(worker: Worker) -> Tensor:
    tables = [DistEmbedding(4, 1, f"e{i}", dtype=torch.float64) for i in range(2)]
    for table, optimiser in zip(
        tables, (SparseSGD(tables[:1], 1.0, scale_grad=0.5), SparseSGD(tables[1:], 1.0, reduction="mean")), strict=True
    ):
        ids = torch.tensor([1, 1, 2])
        table(ids).backward(torch.tensor([[2.0], [4.0], [6.0]], dtype=torch.float64))
        optimiser.step()
    found = lookup(dict.fromkeys(tables, torch.arange(4)))
    return torch.cat([rows.detach() for rows in found.values()], 1)


def test_gradients_are_scaled_or_averaged_where_asked(gang: Gang) -> None:
    for found in gang.run(scaled, 2):
        assert found.tolist() == [[0, 0], [-6, -3], [-6, -6], [0, 0]]


# --- saving and loading --------------------------------------------------------------------------------------


def save(worker: Worker, folder: Path, optimiser: str) -> tuple[Tensor, Tensor]:
    table = DistEmbedding(29, 4, "e", Normal(seed=2), dtype=torch.float64)
    steps = OPTIMISERS[optimiser]([table], lr=0.1)
    for k in range(3):
        table(torch.arange(k, 20)).square().sum().backward()
        steps.step()
    dcp.save({"emb": table.state_dict(), "opt": steps.state_dict()}, checkpoint_id=folder)
    before = table(torch.arange(29)).detach()
    table(torch.arange(29)).square().sum().backward()
    steps.step()
    return before, table(torch.arange(29)).detach()


def load(worker: Worker, folder: Path, optimiser: str, hands: int) -> tuple[Tensor, Tensor]:
    policy = (0, 20, 29) if worker.world_size == 2 else None
    table = DistEmbedding(29, 4, "e", part_policy=policy, dtype=torch.float64)
    steps = OPTIMISERS[optimiser]([table], lr=0.7)
    state = {"emb": table.state_dict(), "opt": steps.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    table.load_state_dict(state["emb"])
    steps.load_state_dict(state["opt"])
    before = table(torch.arange(29)).detach()
    # As many gradients as the ranks that saved had.
    ids = torch.arange(29).repeat(hands) if worker.rank == 0 else torch.empty(0, dtype=torch.int64)
    table(ids).square().sum().backward()
    steps.step()
    return before, table(torch.arange(29)).detach()


@pytest.mark.parametrize("optimiser", sorted(OPTIMISERS))
def test_saved_on_three_workers_and_loaded_on_two(gang: Gang, tmp_path: Path, optimiser: str) -> None:
    saved = gang.run(save, 3, tmp_path / "checkpoint", optimiser)[0]
    for world_size in (2, 1):
        for loaded in gang.run(load, world_size, tmp_path / "checkpoint", optimiser, 3):
            assert torch.equal(saved[0], loaded[0])
            assert difference(saved[1], loaded[1]) < 1e-12, "so does the next step, with the optimiser's state"


def whole_tensors(worker: Worker) -> None:
    table, rows = DistEmbedding(5, 2, "e"), torch.arange(10.0).view(5, 2)
    table.load_state_dict({"weight": rows})
    assert torch.equal(table(torch.arange(5)), rows)
    t = DistTensor((5, 2))
    t.load_state_dict({"rows": rows})
    assert torch.equal(t[torch.arange(5)], rows)
    kept = {name: value.detach().clone() for name, value in table.state_dict().items()}
    table.weight.local_rows.zero_()
    table.load_state_dict(kept)
    assert torch.equal(table(torch.arange(5)), rows)
    with pytest.raises(RuntimeError, match=r"expected torch.float32 of shape \(5, 2\), found torch.float32 of shape \(6, 2\)"):
        table.load_state_dict({"weight": torch.zeros(6, 2)})
    with pytest.raises(RuntimeError, match="weight"):
        table.load_state_dict({})


def test_whole_tensors_and_copies_are_loaded(gang: Gang) -> None:
    gang.run(whole_tensors, 2)


# --- who trains on what --------------------------------------------------------------------------------------


def split(worker: Worker, mask: Tensor, offsets: tuple[int, ...], even: bool) -> list[Tensor]:
    low, high = offsets[worker.rank], offsets[worker.rank + 1]
    masked = DistTensor((len(mask),), torch.bool, "mask", part_policy=offsets)
    masked.local_rows[:] = mask[low:high]
    return [
        node_split(mask, offsets, force_even=even),
        node_split(mask.nonzero().flatten().flip(0), offsets, force_even=even),
        edge_split(masked, force_even=even),
        edge_split(mask[low:high], offsets, force_even=even),
    ]


@pytest.mark.core_on(2, 3)
@pytest.mark.parametrize("even", [True, False])
def test_ids_are_dealt_local_ones_first(gang: Gang, world_size: int, even: bool) -> None:
    mask = torch.rand(53, generator=torch.Generator().manual_seed(3)) < 0.6
    offsets = (*(0, 30, 30, 41)[:world_size], 53)
    found = gang.run(split, world_size, mask, offsets, even)
    for way in range(4):
        dealt = [rank[way] for rank in found]
        assert torch.equal(torch.cat(dealt).sort().values, mask.nonzero().flatten()), "each once"
        sizes = [len(ids) for ids in dealt]
        assert max(sizes) - min(sizes) <= 1 or not even
        for rank, ids in enumerate(dealt):
            low, high = offsets[rank], offsets[rank + 1]
            own = (ids >= low) & (ids < high)
            assert not bool((own[1:] & ~own[:-1]).any()), "its own come first"
            owned = int(mask[low:high].sum())
            assert int(own.sum()) == (min(owned, len(ids)) if even else owned)
