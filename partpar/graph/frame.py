r"""Columns over the nodes or edges of one type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from partpar.errors import GraphError


class Frame(MutableMapping[str, Tensor]):
    r"""A mapping from attribute name to tensor whose rows are the nodes or edges of one type.

    Args:
        num_rows: Number of rows that every attribute must have.
        tensors: The attributes; a value may be a function that reads the tensor when it is first asked for, so that
            an attribute nobody reads costs nothing.
        what: What the rows are, for messages.
    """

    def __init__(
        self,
        num_rows: int,
        tensors: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
        what: str = "rows",
    ) -> None:
        self.num_rows, self.what = num_rows, what
        self._values: dict[str, Tensor | Callable[[], Tensor]] = {}
        for name, value in (tensors or {}).items():
            if isinstance(value, Tensor):
                self[name] = value
            else:
                self._values[name] = value

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise KeyError(f"{self.what}: expected one of {sorted(self._values)}, found {name!r}")
        value = self._values[name]
        if not isinstance(value, Tensor):
            value = self._values[name] = self._checked(name, value())
        return value

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._values[name] = self._checked(name, value)

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values  # without reading it, as Mapping's own would

    def __repr__(self) -> str:
        return f"Frame({self.what}, num_rows={self.num_rows}, {list(self._values)})"

    def to(self, device: torch.device | str) -> Frame:
        r"""The same frame with its attributes on :obj:`device`, each moved when it is first read."""

        def mover(name: str) -> Callable[[], Tensor]:
            return lambda: self[name].to(device)

        return Frame(self.num_rows, {name: mover(name) for name in self._values}, self.what)

    def _checked(self, name: str, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise GraphError(
                f"attribute {name!r} of {self.what}: expected a tensor, found {type(value).__name__}"
            )
        if value.dim() == 0 or value.size(0) != self.num_rows:
            raise GraphError(
                f"attribute {name!r} of {self.what}: expected {self.num_rows} rows, found shape {tuple(value.shape)}"
            )
        return value
