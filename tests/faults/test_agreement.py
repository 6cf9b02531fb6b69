r"""Ranks that do not do the same: found before anything is sent, at the end of the step, or at the timeout; on all of
them, with the call."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import Gang, Outcome, Worker, launch
from graphs import directed_graph

from partpar import GraphData, Route, training
from partpar.nn import global_mean
from partpar.sampling import DistNeighborLoader
from partpar.sharded import DistTensor

TIMEOUT = 4.0


def ring(worker: Worker) -> Route:
    r"""Six rows on each rank, of which the next rank needs two."""
    own = torch.arange(6) + 6 * worker.rank
    wanted = (torch.arange(2) + 6 * worker.rank + 6) % (6 * worker.world_size)
    return Route.from_raw_ids(torch.cat([own, wanted]), own)


def warm(route: Route, *kinds: tuple[int, torch.dtype]) -> None:
    r"""Steps until no call is among the first ones any more."""
    for _ in range(70):
        for width, dtype in kinds:
            route.apply(torch.ones(6, width, dtype=dtype))
    global_mean(torch.ones(6), route=route)


def another_kind(worker: Worker, what: str) -> None:
    route = ring(worker)
    warm(route, (4, torch.float32))
    odd = worker.rank == 1
    width, dtype = (3 if odd and what == "width" else 5), (torch.float64 if odd and what == "dtype" else torch.float32)
    route.apply(torch.ones(6, width, dtype=dtype))


@pytest.mark.timed("another width or dtype on one rank")
@pytest.mark.parametrize(("what", "said"), [("width", "size of dimension 1: rank 0 has 5, rank 1 has 3"),
                                            ("dtype", "dtype: rank 0 has torch.float32, rank 1 has torch.float64")])  # fmt: skip
def test_another_width_or_dtype_is_found_before_the_exchange(gang: Gang, what: str, said: str) -> None:
    for error in gang.run_expecting_errors(another_kind, 3, what):
        assert error == ("AgreementError", f"apply: ranks disagree on {said}; pass the same on every rank")


def same_bytes(worker: Worker) -> None:
    r"""Both kinds were seen, and take as many bytes: nothing but the digest of the calls can tell."""
    route = ring(worker)
    kinds = (4, torch.float32), (2, torch.float64)
    warm(route, *kinds)
    width, dtype = kinds[int(worker.rank == 1)]
    route.apply(torch.ones(6, width, dtype=dtype))
    global_mean(torch.ones(6), route=route)


@pytest.mark.timed("another exchange on one rank")
def test_what_no_check_sees_is_found_at_the_end_of_the_step(gang: Gang) -> None:
    for error in gang.run_expecting_errors(same_bytes, 3):
        assert error is not None
        assert error[0] == "AgreementError"
        assert "send_rows of float64 [2]" in error[1] and "rank 1 in global_mean at test_agreement.py" in error[1]


def test_the_digest_is_needed(gang: Gang) -> None:
    r"""The mutant of the test above: without comparing, the wrong rows go unseen."""
    assert gang.run_expecting_errors(uncompared, 3) == [None] * 3


def uncompared(worker: Worker) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partpar.agreement.compare", lambda group, sums: None)
        same_bytes(worker)


def skip(worker: Worker, on: str, timeout: float = TIMEOUT) -> None:
    context = training.init(timeout=timeout, quiet=True, allocator=False)
    with context:
        route = ring(worker)
        where: dict[str, Any] = {"route": route} if on == "route" else {}
        warm(route, (4, torch.float32))
        if worker.rank != 1:
            route.apply(torch.ones(6, 4))
        global_mean(torch.ones(6), **where)


def wider(worker: Worker) -> None:
    r"""Both kinds were seen, and more bytes come to rank 1 than it awaits."""
    with training.init(timeout=TIMEOUT, quiet=True, allocator=False):
        route = ring(worker)
        warm(route, (4, torch.float32), (64, torch.float32))
        route.apply(torch.ones(6, 64 if worker.rank == 2 else 4))
        global_mean(torch.ones(6), route=route)


@pytest.mark.faults
def test_a_rank_that_gloo_ends_says_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    first, second, third = launch(wider, 3, init=False, check=False, timeout=60)
    assert second.error is None
    assert second.exit_code == -signal.SIGABRT
    for outcome in (first, third):
        assert outcome.error is not None
        assert outcome.error[0] == "RankLostError"
        assert re.search(r"rank 1 \(process \d+\) is gone", outcome.error[1]), outcome
    told = capfd.readouterr().err
    assert re.search(r"Fatal Python error: Aborted.*route\.py.* in apply\n.*test_agreement\.py.* in wider\n", told, re.DOTALL)


def messages(outcomes: list[Outcome], kind: str) -> list[str]:
    assert [o.error is not None and o.error[0] for o in outcomes] == [kind] * 3, outcomes
    return [o.error[1] for o in outcomes if o.error is not None]


@pytest.mark.timed("a skipped exchange, with a timeout of 4 s")
@pytest.mark.faults
@pytest.mark.parametrize("on", ["route", "world"])
def test_a_skipped_exchange_is_told_at_the_timeout(on: str) -> None:
    start = time.monotonic()
    for said in messages(launch(skip, 3, on, init=False, check=False, timeout=60), "AgreementError"):
        assert re.search(r"rank 0 in (Route\.)?apply at \w+.py:\d+, rank 1 in global_mean at \w+.py:\d+, rank 2 in ", said), said
    assert time.monotonic() - start < 45


@pytest.mark.timed("a skipped exchange, with PARTPAR_DEBUG=1")
@pytest.mark.faults
@pytest.mark.parametrize("on", ["route", "world"])
def test_debugging_finds_a_skipped_exchange_at_once(on: str) -> None:
    env = {"PARTPAR_DEBUG": "1"}
    start = time.monotonic()
    for said in messages(launch(skip, 3, on, 600.0, init=False, check=False, timeout=60, env=env), "AgreementError"):
        assert re.search(r"rank 0 in apply in (Route\.)?apply at test_agreement.py", said), said
        assert "rank 1 in all_reduce of float64 [4] in global_mean at test_agreement.py" in said, said
    assert time.monotonic() - start < 45


def sampled(worker: Worker, root: str, what: str) -> None:
    share, odd = GraphData.load_partition(root, worker.rank, 2, algorithm="random"), worker.rank == 1
    fan_outs = [2, 1] if odd and what == "fan-outs" else [2, 2]
    names = ["x"] if odd and what == "attributes" else None
    DistNeighborLoader(share, fan_outs, attributes=names)


@pytest.mark.faults
@pytest.mark.parametrize("what", ["fan-outs", "attributes"])
def test_loaders_agree_on_what_they_sample(what: str, tmp_path: Path) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2, algorithm="random")
    for outcome in launch(sampled, 2, str(tmp_path), what, check=False, timeout=60):
        assert outcome.error is not None
        assert outcome.error[0] == "AgreementError"
        assert ("[2, 1]" if what == "fan-outs" else "attributes") in outcome.error[1]


def tables(worker: Worker) -> None:
    DistTensor((30, 3 + (worker.rank == 1)), name="t")


def test_tensors_agree_on_their_width(gang: Gang) -> None:
    for error in gang.run_expecting_errors(tables, 3):
        assert error is not None
        assert error[0] == "AgreementError"
        assert "size of dimension 1: rank 0 has 3, rank 1 has 4" in error[1]
