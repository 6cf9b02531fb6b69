r"""Partition books by raw ids, read from the files of all shares when they are first asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partpar.graph import EdgeType, GraphData
from partpar.serving.partition import open_part


class FileBook:
    r"""Which part owns a raw id. As ``book[ids]`` it reads like a tensor; one is made at first use, as long as the graph
    has ids.

    Args:
        read: The raw ids that a part owns.
        num_parts: Number of parts.
    """

    def __init__(self, read: Callable[[int], Tensor], num_parts: int) -> None:
        self._read, self._num_parts = read, num_parts
        self._parts: Tensor | None = None

    def tensor(self) -> Tensor:
        r"""``[n]`` int64: the part of each raw id."""
        if self._parts is None:
            owned = [self._read(part) for part in range(self._num_parts)]
            parts = torch.full((sum(ids.numel() for ids in owned),), -1)
            for part, ids in enumerate(owned):
                parts[ids] = part
            self._parts = parts
        return self._parts

    def __getitem__(self, ids: Any) -> Tensor:
        return self.tensor()[ids]

    def __len__(self) -> int:
        return self.tensor().numel()

    def numel(self) -> int:
        r"""Number of ids."""
        return len(self)

    def size(self, dim: int | None = None) -> Any:
        r"""As of a tensor."""
        return self.tensor().size() if dim is None else self.tensor().size(dim)

    def tolist(self) -> list[int]:
        r"""As of a tensor."""
        return self.tensor().tolist()


def node_books(folder: Path, share: GraphData) -> dict[str, FileBook]:
    r"""The books of all node types."""

    def book(node_type: str) -> FileBook:
        return FileBook(lambda part: open_part(folder, part).node(node_type)["raw_ids"], share.num_parts)

    return {t: book(t) for t in share.node_types}


def edge_books(folder: Path, share: GraphData) -> dict[EdgeType, FileBook]:
    r"""The books of all edge types."""

    def book(edge_type: EdgeType) -> FileBook:
        return FileBook(lambda part: open_part(folder, part).edge(edge_type)["raw_ids"], share.num_parts)

    return {t: book(t) for t in share.edge_types}
