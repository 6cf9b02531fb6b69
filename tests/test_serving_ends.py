r"""How a service ends: wrong starts, errors of others, peers that are lost, and nothing left behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from gang import Gang, Worker, launch
from graphs import directed_graph
from test_serving import NODE, cut

from partpar import GraphData
from partpar.errors import AgreementError, PeerLostError, RemoteError, ServiceError
from partpar.serving import start_service


def case_wrong_share(worker: Worker, root: Path) -> None:
    start_service(GraphData.load_partition(root, 0, 2, "given"), timeout=20)


def case_wrong_number(worker: Worker, root: Path) -> None:
    start_service(GraphData.load_partition(root, 0, 2, "given"), timeout=20)


def test_wrong_starts_raise_on_every_rank(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    for error in gang.run_expecting_errors(case_wrong_share, 2, tmp_path):
        assert error is not None and "expected part 1 on rank 1" in error[1]
    for error in gang.run_expecting_errors(case_wrong_number, 3, tmp_path):
        assert error is not None and "multiple of 2 workers" in error[1]
    with pytest.raises(ServiceError, match="process group"):
        start_service(GraphData.load_partition(tmp_path, 0, 2, "given"))


def case_remote_error(worker: Worker, root: Path) -> None:
    def fail(tensors: object, values: object) -> dict:
        raise ZeroDivisionError("a bad sample")

    with start_service(GraphData.load_partition(root, worker.rank, 2, "given"), timeout=20) as service:
        service.register("fail", fail)
        torch.distributed.barrier()
        if worker.rank == 0:
            with pytest.raises(RemoteError, match=r"part 1 \(worker-1\) failed in 'fail': ZeroDivisionError: a bad sample"):
                service.begin(1, "fail", {}).wait()
            with pytest.raises(RemoteError, match="line"):
                service.begin(1, "fail", {}).wait()
        service.ping(1 - worker.rank)  # it goes on


def test_remote_error_names_the_part_and_shows_its_traceback(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    gang.run(case_remote_error, 2, tmp_path)


def case_again(worker: Worker, root: Path, times: int) -> list[tuple[int, ...]]:
    share = GraphData.load_partition(root, worker.rank, 2, "given")
    counts = []
    for _ in range(times):
        with start_service(share, timeout=20) as service, start_service(share, timeout=20) as other:
            for each in (service, other):  # two in one program, used in turn
                each.fetch(NODE, ["x"], each.ids_of(NODE, torch.arange(60)))
        counts.append(
            (threading.active_count(), *(len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd")))
        )
    return counts


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.soak)])
def test_services_leave_nothing_behind(gang: Gang, tmp_path, times):
    cut(tmp_path, 2)
    for counts in gang.run(case_again, 2, tmp_path, times, timeout=120):
        assert counts[-1] <= counts[1]


def case_peer(worker: Worker, root: Path, stop: str) -> str:
    share = GraphData.load_partition(root, worker.rank, 2, "given")
    service = start_service(share, timeout=4)
    service.ping(1 - worker.rank)
    torch.distributed.barrier()
    if worker.rank == 1:
        import signal

        os.kill(os.getpid(), signal.SIGKILL if stop == "dead" else signal.SIGSTOP)
    time.sleep(0.5)
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=r"part 1 \(worker-1\)") as error:
        service.fetch(NODE, ["x"], torch.arange(60))
    service.transport.abandon()
    service.close()
    assert time.monotonic() - start < 15
    return str(error.value)


@pytest.mark.faults
@pytest.mark.parametrize("stop", ["dead", "stopped"])
def test_lost_peer_is_named_within_the_timeout(tmp_path, stop):
    cut(tmp_path, 2)
    outcomes = launch(case_peer, 2, tmp_path, stop, check=False, timeout=40)
    assert outcomes[0].ok, outcomes[0].traceback or outcomes[0]
    assert "'fetch'" in outcomes[0].value


def case_leave_without_close(worker: Worker, root: Path) -> float:
    service = start_service(GraphData.load_partition(root, worker.rank, 2, "given"), timeout=5)
    if worker.rank == 1:
        with pytest.raises(ZeroDivisionError), service:
            raise ZeroDivisionError
        return 0.0
    start = time.monotonic()
    service.close()
    return time.monotonic() - start


@pytest.mark.faults
def test_closing_is_bounded_where_a_peer_failed(gang: Gang, tmp_path):
    cut(tmp_path, 2)
    assert gang.run(case_leave_without_close, 2, tmp_path)[0] < 15


def test_agreement_on_the_partition(gang: Gang, tmp_path):
    cut(tmp_path / "one", 2)
    cut(tmp_path / "two", 2, directed_graph(seed=1))
    for error in gang.run_expecting_errors(case_other_partition, 2, tmp_path):
        assert error is not None and error[0] == AgreementError.__name__


def case_other_partition(worker: Worker, root: Path) -> None:
    folder = root / ("one" if worker.rank == 0 else "two")
    start_service(GraphData.load_partition(folder, worker.rank, 2, "given"), timeout=20)
