r"""The training process's service, asked by the processes that make its batches.

They hold nothing of the graph: what they ask goes over a socket of this machine, guarded by a key, to a thread of the
training process, which asks the service as its own threads would. Who connects is told first what the service holds.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.errors import RemoteError, ServiceError
from partpar.graph import EdgeType
from partpar.sampling.batches import Kind
from partpar.sampling.wire import receive, send
from partpar.serving.messages import HopReply, HopRequest
from partpar.serving.service import Service
from partpar.serving.transport import Tensors, Values, Verbs, below


def _plain(kind: Kind) -> str | list[str]:
    return kind if isinstance(kind, str) else list(kind)


def _kind(plain: str | Sequence[str]) -> Any:
    return plain if isinstance(plain, str) else tuple(plain)


@dataclass(frozen=True)
class Address:
    r"""Where a relay listens."""

    path: str
    key: bytes


class Questions:
    r"""What may be asked through a relay.

    Args:
        service: Who answers.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.verbs = Verbs()
        for verb in (self.hop, self.fetch, self.ids_of, self.has_node_attr, self.node_rows):
            self.verbs.register(verb.__name__, verb)

    def answer(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Checks a question and hands it to its verb; raises errors of ours only."""
        return self.verbs.answer(values.pop("verb", ""), tensors, values)

    def about(self) -> tuple[Tensors, Values]:
        r"""What the service holds."""
        service = self.service
        offsets = {t: service.offsets(t) for t in service.node_types}
        types = {"node_types": list(service.node_types), "edge_types": [list(t) for t in service.edge_types]}
        return offsets, {**types, "part_id": service.part_id, "num_parts": service.num_parts}

    def hop(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Neighbours, as :meth:`~partpar.serving.Service.hop_begin` has them."""
        requests = {}
        for k, plain in values["requests"].items():
            request = HopRequest.from_wire(below(tensors, k), plain)
            requests[request.edge_type] = request
        out: Tensors = {}
        for k, reply in enumerate(self.service.hop_begin(requests).wait().values()):
            out.update({f"{k}/{name}": t for name, t in reply.to_wire()[0].items()})
        return out

    def fetch(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Rows of several types."""
        wanted = {_kind(kind): (names, tensors[str(k)]) for k, (kind, names) in enumerate(values["wanted"])}
        rows = self.service.fetch_all_begin(wanted).wait()
        return {f"{k}/{name}": rows[kind][name] for k, kind in enumerate(wanted) for name in wanted[kind][0]}

    def ids_of(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Ids of raw ids."""
        return {"ids": self.service.ids_of(_kind(values["kind"]), tensors["raw_ids"])}

    def has_node_attr(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Whether nodes have an attribute."""
        return {"has": torch.tensor(self.service.has_node_attr(values["kind"], values["name"]))}

    def node_rows(self, tensors: Tensors, values: Values) -> Tensors:
        r"""Rows of one attribute of nodes."""
        return {"rows": self.service.node_rows(values["kind"], values["name"], tensors["ids"])}


class Relay:
    r"""Lets other processes of this machine ask a service; a thread for each.

    Args:
        service: Who answers.
    """

    def __init__(self, service: Service) -> None:
        self.questions = Questions(service)
        self._folder = tempfile.mkdtemp(prefix="partpar-")  # only this user may enter
        self.address = Address(str(Path(self._folder) / "relay"), secrets.token_bytes(32))
        self._listener = Listener(self.address.path, "AF_UNIX", authkey=self.address.key)
        self._connections: list[Connection] = []
        self._threads = [threading.Thread(target=self._accept, name="partpar-relay", daemon=True)]
        self._closed = False
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):  # closed, or somebody without the key
                continue
            if self._closed:
                connection.close()
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), name="partpar-relay", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(OSError, EOFError), connection:
            send(connection, *self.questions.about())
            while True:
                try:
                    question = receive(connection)
                except ServiceError:  # where the next one begins is not known
                    send(connection, {}, {"error": traceback.format_exc()})
                    return
                try:
                    answer, told = self.questions.answer(*question), {}
                except Exception:  # noqa: BLE001 - it is raised where the answer is awaited
                    answer, told = {}, {"error": traceback.format_exc()}
                send(connection, answer, told)

    def close(self) -> None:
        r"""Ends all threads. May be called again."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError, EOFError):  # wakes who accepts
            Client(self.address.path, "AF_UNIX", authkey=self.address.key).close()
        self._listener.close()
        for thread in self._threads:
            thread.join(5.0)
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class _There:
    value: Any

    def wait(self) -> Any:
        return self.value


class RelayedService:
    r"""A service asked through a :class:`Relay`; what a :class:`~partpar.sampling.batches.BatchMaker` needs of one. For
    one thread.

    Args:
        address: Of the relay.
    """

    def __init__(self, address: Address) -> None:
        self._connection = Client(address.path, "AF_UNIX", authkey=address.key)
        try:
            offsets, about = receive(self._connection)
        except (EOFError, OSError) as error:
            raise RemoteError(f"the training process is gone: it was to say what it holds, and {error!r} came") from error
        self._offsets = offsets
        self.node_types: list[str] = about["node_types"]
        self.edge_types: list[EdgeType] = [tuple(t) for t in about["edge_types"]]
        self.part_id, self.num_parts = int(about["part_id"]), int(about["num_parts"])

    def _ask(self, verb: str, tensors: Mapping[str, Tensor], **values: Any) -> Tensors:
        try:
            send(self._connection, tensors, {"verb": verb, **values})
            answer, told = receive(self._connection)
        except (EOFError, OSError) as error:
            raise RemoteError(f"the training process is gone: it was asked for {verb!r} and {error!r} came") from error
        if "error" in told:
            raise RemoteError(f"the training process failed in {verb!r}; the traceback there:\n{told['error']}")
        return answer

    def offsets(self, node_type: str) -> Tensor:
        return self._offsets[node_type]

    def hop_begin(self, requests: Mapping[EdgeType, HopRequest]) -> _There:
        tensors: Tensors = {}
        values = {}
        for k, request in enumerate(requests.values()):
            mine, values[str(k)] = request.to_wire()
            tensors.update({f"{k}/{name}": tensor for name, tensor in mine.items()})
        answer = self._ask("hop", tensors, requests=values)
        replies = {}
        for k, edge_type in enumerate(requests):
            replies[edge_type] = HopReply.from_wire(below(answer, k), {})
        return _There(replies)

    def fetch_all_begin(self, wanted: Mapping[Kind, tuple[Any, Tensor]]) -> _There:
        question = [[_plain(kind), list(names)] for kind, (names, _) in wanted.items()]
        tensors = {str(k): ids for k, (_, ids) in enumerate(wanted.values())}
        answer = self._ask("fetch", tensors, wanted=question)
        return _There(
            {kind: {n: answer[f"{k}/{n}"] for n in names} for k, (kind, (names, _)) in enumerate(wanted.items())}
        )

    def ids_of(self, kind: Kind, raw_ids: Tensor) -> Tensor:
        return self._ask("ids_of", {"raw_ids": raw_ids}, kind=_plain(kind))["ids"]

    def has_node_attr(self, node_type: str, name: str) -> bool:
        return bool(self._ask("has_node_attr", {}, kind=node_type, name=name)["has"])

    def node_rows(self, node_type: str, name: str, ids: Tensor) -> Tensor:
        return self._ask("node_rows", {"ids": ids}, kind=node_type, name=name)["rows"]
