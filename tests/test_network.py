r"""A simulated network delays exchanges by what it says, counts what they send, and leaves no trace."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from gang import Gang, Worker
from torch import Tensor

from partpar import Route, exchange
from partpar.training.network import NetworkError, SimulatedNetwork

ROWS, WIDTH = 50, 20  # that every rank sends to every other one, float64


def _route(worker: Worker) -> tuple[Route, Tensor]:
    r"""Every rank needs all rows of all ranks."""
    own = torch.arange(ROWS) + ROWS * worker.rank
    others = torch.arange(ROWS * worker.world_size)
    route = Route.from_raw_ids(torch.cat([own, others[others // ROWS != worker.rank]]), own, worker.group)
    return route, (own.double() + 1)[:, None].expand(-1, WIDTH).contiguous().requires_grad_()


def delayed(worker: Worker, seconds: float, latency: float) -> None:
    route, x = _route(worker)
    exact = route.apply(x.detach())
    predicted = sum(route.bytes_per_peer(WIDTH, x.dtype))
    before = exchange.all_to_all
    # So narrow that one exchange of this many bytes takes the given seconds.
    with SimulatedNetwork(max(predicted, 1) * 8 / seconds / 1e9, latency) as network:
        dist.barrier(worker.group)
        start = time.perf_counter()
        first, second = route.apply_begin(x), route.apply_begin(x)
        begun = time.perf_counter() - start
        out, again = first.wait(), second.wait()
        taken = time.perf_counter() - start
        assert torch.equal(out, exact)
        assert torch.equal(again, exact)
        if worker.world_size == 1:
            assert network.traffic.exchanges == 0
            return
        assert taken >= 2 * seconds + latency, "one after the other through one interface"
        assert begun < taken - seconds, "beginning does not wait"
        assert network.traffic.exchanges == 2
        assert network.traffic.bytes_sent == 2 * predicted == network.traffic.bytes_received
        assert network.traffic.visible_seconds <= taken

        start = time.perf_counter()
        out.sum().backward()
        assert time.perf_counter() - start >= seconds + latency, "gradients travel as slowly"
        assert network.traffic.bytes_sent == 3 * predicted
        assert torch.equal(x.grad, torch.full_like(x, worker.world_size))
    assert exchange.all_to_all is before
    assert network.traffic.bytes_sent == 3 * predicted


def hidden(worker: Worker, seconds: float) -> tuple[float, float]:
    route, x = _route(worker)
    with SimulatedNetwork(sum(route.bytes_per_peer(WIDTH, x.dtype)) * 8 / seconds / 1e9) as network:
        dist.barrier(worker.group)
        flight = route.apply_begin(x)
        time.sleep(2 * seconds)
        flight.wait()
        early = network.traffic.hidden_seconds
        network.traffic.reset()
        route.apply_begin(x).wait()
        return early, network.traffic.visible_seconds


@pytest.mark.core_on(2, 3)
def test_exchanges_take_what_the_network_needs(gang: Gang, world_size: int) -> None:
    gang.run(delayed, world_size, 0.05, 0.02)


def test_work_while_rows_travel_hides_them(gang: Gang) -> None:
    for early, late in gang.run(hidden, 2, 0.1):
        assert 0.099 <= early < 0.2, "on their way no longer than the network took"
        assert late >= 0.05, "nothing else was done meanwhile"


def unlimited(worker: Worker) -> None:
    route, x = _route(worker)
    with SimulatedNetwork() as network:
        assert torch.equal(route.apply(x), route.apply(x))
        assert network.seconds(10**15) == 0
    assert network.traffic.exchanges == 2


def test_without_a_limit_it_only_watches(gang: Gang) -> None:
    gang.run(unlimited, 2)


def fails_inside(worker: Worker) -> None:
    before = exchange.all_to_all
    with pytest.raises(ZeroDivisionError), SimulatedNetwork(1.0):
        raise ZeroDivisionError
    assert exchange.all_to_all is before


def test_an_error_inside_leaves_no_network_behind(gang: Gang) -> None:
    gang.run(fails_inside, 1)


@pytest.mark.parametrize("arguments", [(0.0,), (-1.0,), (1.0, -0.1)])
def test_impossible_networks_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(NetworkError, match="bandwidth above 0"):
        SimulatedNetwork(*arguments)
