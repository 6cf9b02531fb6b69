r"""Rows of stores that were made of tensors, by partition books, on the workers that a router names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from partpar.serving import agent
from partpar.serving.remote import RpcTransport
from partpar.serving.transport import Tensors, Values, Verbs

if TYPE_CHECKING:
    from partpar.serving.feature_store import LocalFeatureStore

_numbers = itertools.count()
_TIMEOUT = 60.0


class Router(Protocol):
    r"""Says which worker to ask for a part."""

    def get_to_worker(self, partition_idx: int) -> str:
        r"""The worker's name."""
        ...


class Lookup:
    r"""Answers for one store, and asks those of other parts.

    Args:
        store: Whose rows.
        router: Names the workers of parts.
    """

    def __init__(self, store: LocalFeatureStore, router: Router) -> None:
        self.store, self.number = store, next(_numbers)
        workers = [[router.get_to_worker(p)] for p in range(store.num_partitions)]
        self.transport = RpcTransport(f"store-{self.number}", workers, _TIMEOUT)
        verbs = Verbs()
        verbs.register("rows", self._answer_rows)
        verbs.register("put", self._answer_put)
        agent.offer(self.transport.endpoint, verbs)

    def begin(self, index: Tensor, parts: Tensor, group: Any, name: str) -> Callable[[], Tensor]:
        r"""Asks the owners of raw ids; what it returns waits for the rows, in order."""
        asked, here = [], None
        for part in parts.unique().tolist():
            places = (parts == part).nonzero().flatten()
            if part == self.store.partition_idx:
                here = places
            else:
                question = {"group": _plain(group), "name": name}
                asked.append((places, self.transport.begin(part, "rows", {"ids": index[places]}, question)))
        pieces = [] if here is None else [(here, self._rows(index[here], group, name))]

        def wait() -> Tensor:
            pieces.extend((places, flight.wait()["rows"]) for places, flight in asked)
            asked.clear()
            if not pieces:
                return self._rows(index, group, name)
            out = pieces[0][1].new_empty((index.numel(), *pieces[0][1].shape[1:]))
            for places, rows in pieces:
                out[places] = rows
            return out

        return wait

    def put(self, index: Tensor, rows: Tensor, parts: Tensor, group: Any, name: str) -> None:
        r"""Changes rows at their owners."""
        flights = []
        for part in parts.unique().tolist():
            places = parts == part
            tensors = {"ids": index[places], "rows": rows[places]}
            values = {"group": _plain(group), "name": name}
            if part == self.store.partition_idx:
                self._answer_put(tensors, values)
            else:
                flights.append(self.transport.begin(part, "put", tensors, values))
        for flight in flights:
            flight.wait()

    def _rows(self, ids: Tensor, group: Any, name: str) -> Tensor:
        rows = self.store.get_tensor_from_global_id(group_name=group, attr_name=name, index=ids)
        assert rows is not None
        return rows

    def _answer_rows(self, tensors: Tensors, values: Values) -> Tensors:
        return {"rows": self._rows(tensors["ids"], _group(values["group"]), values["name"])}

    def _answer_put(self, tensors: Tensors, values: Values) -> Tensors:
        group = _group(values["group"])
        rows = self.store.rows_of(group, tensors["ids"])
        self.store.put_tensor(tensors["rows"], group_name=group, attr_name=values["name"], index=rows)
        return {}


def _plain(group: Any) -> Any:
    return list(group) if isinstance(group, tuple) else group


def _group(plain: Any) -> Any:
    return tuple(plain) if isinstance(plain, list) else plain


