r"""Rows of a sharded tensor for any rank at any time: its owners answer through the remote service."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.errors import IdError, RouteError
from partpar.kernels.whole_rows import fetch_rows, put_rows, whole
from partpar.serving import agent
from partpar.serving.remote import RpcTransport
from partpar.serving.transport import InFlight, InProcessTransport, Tensors, Transport, Values, Verbs
from partpar.sharded.shard import Shard, names
from partpar.sharded.tensor import DistTensor, check_ids, check_rows
from partpar.sharded.wanted import Wanted, want

GATHER, SCATTER = "gather rows", "scatter rows"
_number = 0  # of services that this process took part in


def register(verbs: Verbs, group: ProcessGroup | None = None) -> None:
    r"""Lets the tensors of a group be asked for.

    Args:
        verbs: Of what answers in this process.
        group: The process group of the tensors; by default all processes.
    """
    known = names(exchange.own_group(group))

    def find(values: Values) -> Shard:
        shard = known.get(str(values.get("name")))
        if shard is None or shard.label != values.get("label"):
            raise RouteError(
                f"expected the name of a tensor of this shape that is here, found {values.get('name')!r}; here are {known.all()}"
            )
        return shard

    def gather(tensors: Tensors, values: Values) -> Tensors:
        shard, rows = find(values), _row_numbers(tensors)
        out = torch.empty((len(rows), *shard.rows.shape[1:]), dtype=shard.rows.dtype)
        _refuse(shard, rows, fetch_rows(shard.whole, rows, whole(out)))
        return {"rows": out}

    def scatter(tensors: Tensors, values: Values) -> Tensors:
        shard, rows = find(values), _row_numbers(tensors)
        given, error = check_rows(shard, tensors["ids"], tensors.get("rows"))
        if error is not None:
            raise error
        _refuse(shard, rows, put_rows(shard.whole, rows, whole(given)))
        return {}

    verbs.register(GATHER, gather)
    verbs.register(SCATTER, scatter)


def _row_numbers(tensors: Tensors) -> np.ndarray:
    ids = tensors.get("ids")
    if ids is None or ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise RouteError("expected 1-dimensional int32 or int64 'ids'")
    return ids.contiguous().numpy()


def _refuse(shard: Shard, rows: np.ndarray, wrong: int) -> None:
    if wrong >= 0:
        raise IdError(f"{shard.name}: expected a row below {len(shard.rows)}, found {int(rows[wrong])}")


class RowService:
    r"""Answers for this process's rows until it is closed; see :func:`serve_rows`. A context manager.

    Args:
        transport: Asks all ranks.
        endpoint: What this process answers under; :obj:`None` when alone.
        timeout: Seconds.
    """

    def __init__(self, transport: Transport, endpoint: str | None, timeout: float) -> None:
        self.transport, self._endpoint, self._timeout = transport, endpoint, timeout

    def close(self, wait: bool = True) -> None:
        r"""Stops answering, once no rank asks any more. May be called again.

        Args:
            wait: Whether to wait for the other ranks to close as well; not after a failure.
        """
        if self._endpoint is not None:
            agent.stop(self._timeout, wait=agent.withdraw(self._endpoint, self._timeout, wait))
            self._endpoint = None

    def __enter__(self) -> RowService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=error is None)


def serve_rows(group: ProcessGroup | None = None, timeout: float = 60.0, num_threads: int = 4) -> RowService:
    r"""Lets every rank ask for rows of every other's tensors, made before or after (collective).

    .. code-block:: python

        with serve_rows() as service:
            rows = t.one_sided(service.transport)[ids]  # whatever the other ranks do

    Args:
        group: The process group of the tensors, which must have all processes.
        timeout: Seconds until a rank that does not answer counts as lost.
        num_threads: How many questions this process answers at a time, at least 4.

    Raises:
        RouteError: The group lacks a process; on every rank of it.
    """
    global _number
    own, verbs = exchange.own_group(group), Verbs()
    register(verbs, group)
    if own is None:
        return RowService(InProcessTransport({0: verbs}), None, timeout)
    size, everybody = dist.get_world_size(own), dist.get_world_size()
    wrong = None
    if size != everybody:
        wrong = f"serve_rows: expected a group of all {everybody} processes, found one of {size}"
    told = exchange.agree(own, "serve_rows", {"_number": _number}, wrong)
    _number = 1 + max(fields["_number"] for fields in told)
    agent.start_in_default_group(timeout, num_threads)
    called, endpoint = agent.names(), f"rows-{_number}"
    workers = [[called[rank]] for rank in dist.get_process_group_ranks(own)]
    agent.offer(endpoint, verbs)
    exchange.agree(own, "serve_rows", {})  # nobody is asked before all can answer
    return RowService(RpcTransport(endpoint, workers, timeout), endpoint, timeout)


class OneSided:
    r"""A :class:`DistTensor` whose rows a rank fetches and puts without the others' calling. Its owners answer at once,
    also in the midst of a collective call or of an optimiser's step: who needs one state for all rows waits for a
    barrier.

    Args:
        tensor: The tensor.
        transport: To its ranks, as of :func:`serve_rows`, or one whose verbs were given to :func:`register`.
    """

    def __init__(self, tensor: DistTensor, transport: Transport) -> None:
        self.tensor, self.transport = tensor, transport

    def gather_begin(self, ids: Tensor) -> RowsAskedFor:
        r"""Asks all owners; other work may be done before :meth:`RowsAskedFor.wait`."""
        shard = self.tensor.shard
        checked, error = check_ids(shard.name, ids)
        if error is not None:
            raise error
        wanted = want(shard, checked)
        return RowsAskedFor(shard, wanted, self._ask(GATHER, wanted, {}))

    def __getitem__(self, ids: Tensor) -> Tensor:
        r"""The rows of ids.

        Args:
            ids: ``[n]`` int64 or int32, in any order, repeated or none.

        Raises:
            IdError: An id is out of range.
            RemoteError: An owner has no such tensor.
            PeerLostError: An owner is gone, or did not answer in time.
        """
        return self.gather_begin(ids).wait()

    def __setitem__(self, ids: Tensor, rows: Tensor | float) -> None:
        r"""Replaces rows; returns once they are replaced. Of several rows for one id, the last one stays.

        Raises:
            RouteError: Shape or dtype do not fit; and as for :meth:`__getitem__`.
        """
        shard = self.tensor.shard
        checked, error = check_ids(shard.name, ids)
        values = shard.rows[:0]
        if error is None:
            values, error = check_rows(shard, checked, rows)
        if error is not None:
            raise error
        wanted = want(shard, checked)
        asked = self._ask(SCATTER, wanted, {"rows": values})
        own = wanted.block(shard.rank)
        put_rows(shard.whole, wanted.local[own], whole(values), wanted.order[own])
        for answer in asked.values():
            answer.wait()

    def _ask(self, verb: str, wanted: Wanted, given: dict[str, Tensor]) -> dict[int, InFlight]:
        """All owners at once."""
        shard, asked = self.tensor.shard, {}
        values: dict[str, Any] = {"name": shard.name, "label": shard.label}
        for part in np.flatnonzero(wanted.counts).tolist():
            if part != shard.rank:
                block = wanted.block(part)
                order = torch.from_numpy(wanted.order[block])
                tensors = {"ids": torch.from_numpy(wanted.local[block].copy())}
                asked[part] = self.transport.begin(
                    part, verb, tensors | {name: rows[order] for name, rows in given.items()}, values
                )
        return asked


class RowsAskedFor:
    r"""A one-sided gather that has begun."""

    def __init__(self, shard: Shard, wanted: Wanted, asked: dict[int, InFlight]) -> None:
        self._shard, self._wanted, self._asked = shard, wanted, asked

    def wait(self) -> Tensor:
        r"""Awaits and returns ``[n, *]``, a tensor of the caller's own."""
        shard, wanted = self._shard, self._wanted
        out = torch.empty((len(wanted.order), *shard.rows.shape[1:]), dtype=shard.rows.dtype)
        own = wanted.block(shard.rank)
        fetch_rows(shard.whole, wanted.local[own], whole(out), wanted.order[own])
        for part, answer in self._asked.items():
            out[torch.from_numpy(wanted.order[wanted.block(part)])] = answer.wait()["rows"]
        return out
