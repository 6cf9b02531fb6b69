r"""The edges of a share in the form that kernels read: compressed by destination, and by source."""

import weakref
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.kernels.csr import compress, expand, index_dtype


class Split(NamedTuple):
    r"""The two halves of an adjacency; weights of the whole go to the halves by ``weight[owned_edges]``."""

    owned: "Adjacency"
    halo: "Adjacency"
    owned_edges: Tensor
    halo_edges: Tensor


@dataclass(frozen=True, eq=False)
class Adjacency:
    r"""Edges from :obj:`num_src` sources to :obj:`num_dst` destinations, grouped by destination.

    It is immutable; what derives from it (the transpose, degrees, the split) is built at first use and kept,
    so that all layers that use one adjacency share one copy.

    Args:
        indptr (Tensor): int64 ``[num_dst + 1]``; the edges into ``i`` are those at
            ``indptr[i]..indptr[i+1]-1``.
        indices (Tensor): int32 ``[E]``, the source of each edge (int64 is converted).
        num_src (int): The number of sources, below ``2**31``.
        num_dst (int): The number of destinations, below ``2**31``.
        edge_ids (Tensor, optional): int64 ``[E]``, the place of each edge in the list it was made from.
        check (bool, optional): If :obj:`False`, the arrays are trusted. Kernels do not check bounds, so this
            is for arrays made here. (default: :obj:`True`)

    Raises:
        GraphError: If the arrays do not fit each other or an index is out of bounds.
    """

    indptr: Tensor
    indices: Tensor
    num_src: int
    num_dst: int
    edge_ids: Tensor | None = None
    check: InitVar[bool] = True
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self, check: bool) -> None:
        if check:
            self._check()
        object.__setattr__(self, "indptr", self.indptr.to(torch.int64).contiguous())
        object.__setattr__(self, "indices", self.indices.to(torch.int32).contiguous())

    def __repr__(self) -> str:
        return f"Adjacency({self.num_src} sources, {self.num_dst} destinations, {self.indices.numel()} edges)"

    def _check(self) -> None:
        if max(self.num_src, self.num_dst) >= 2**31 or min(self.num_src, self.num_dst) < 0:
            raise GraphError(
                f"An adjacency counts nodes in 32 bits, but was given {self.num_src} sources and "
                f"{self.num_dst} destinations. Cut the graph into more parts."
            )
        if self.indptr.dim() != 1 or self.indptr.numel() != self.num_dst + 1:
            raise GraphError(
                f"Expected `indptr` of shape [{self.num_dst + 1}] (one more than the destinations), "
                f"found {list(self.indptr.shape)}."
            )
        if self.indices.dim() != 1 or self.indices.is_floating_point() or self.indptr.is_floating_point():
            raise GraphError(
                f"Expected integer `indptr` and one-dimensional integer `indices`, found "
                f"{self.indptr.dtype} and {self.indices.dtype} {list(self.indices.shape)}."
            )
        num_edges = self.indices.numel()
        if (
            int(self.indptr[0]) != 0
            or int(self.indptr[-1]) != num_edges
            or bool((self.indptr.diff() < 0).any())
        ):
            raise GraphError(
                f"Expected `indptr` to rise from 0 to the {num_edges} edges, found it from "
                f"{int(self.indptr[0])} to {int(self.indptr[-1])}, or falling in between."
            )
        if num_edges:
            low, high = (int(bound) for bound in self.indices.aminmax())
            if low < 0 or high >= self.num_src:
                raise GraphError(f"Expected sources in 0..{self.num_src - 1}, found {low}..{high}.")
        if self.edge_ids is not None and self.edge_ids.shape != self.indices.shape:
            raise GraphError(
                f"Expected `edge_ids` of shape [{num_edges}], found {list(self.edge_ids.shape)}."
            )

    @classmethod
    def from_edge_index(cls, edge_index: Tensor, num_src: int, num_dst: int) -> "Adjacency":
        r"""Groups an ``edge_index`` by destination; edges of one destination keep their order.

        Args:
            edge_index (Tensor): Integers ``[2, E]``: row 0 sources, row 1 destinations.
            num_src (int): The number of sources.
            num_dst (int): The number of destinations.

        Raises:
            GraphError: If the shape is another or an end is out of bounds.
        """
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.is_floating_point():
            raise GraphError(
                f"Expected an integer `edge_index` of shape [2, E], found {edge_index.dtype} "
                f"{list(edge_index.shape)}."
            )
        src, dst = edge_index[0].contiguous(), edge_index[1].contiguous()
        for name, ends, count in (("sources", src, num_src), ("destinations", dst, num_dst)):
            if ends.numel() and (int(ends.min()) < 0 or int(ends.max()) >= count):
                raise GraphError(
                    f"Expected {name} in 0..{count - 1}, found {int(ends.min())}..{int(ends.max())}."
                )
        indptr, order = compress(dst, num_dst)
        return cls(indptr, src.index_select(0, order), num_src, num_dst, order.to(torch.int64))

    @property
    def num_edges(self) -> int:
        return self.indices.numel()

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def _keep(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]

    @property
    def degrees(self) -> Tensor:
        r"""int64 ``[num_dst]``: the number of edges into each destination."""
        return self._keep("degrees", self.indptr.diff)

    @property
    def destinations(self) -> Tensor:
        r"""int32 ``[E]``: the destination of each edge. Not kept."""
        return expand(self.indptr, self.num_edges)

    @property
    def offsets(self) -> Tensor:
        r"""``indptr`` in 32 bits where they suffice, for kernels that want it in the dtype of ``indices``."""
        return self._keep("offsets", lambda: self.indptr.to(index_dtype(self.num_edges)))

    @property
    def transposed(self) -> "Adjacency":
        r"""The same edges grouped by source; its edge ``k`` is edge ``transpose_order[k]`` of this one."""
        return self._transpose()[0]

    @property
    def transpose_order(self) -> Tensor:
        r"""``[E]``: values of this adjacency's edges go to the transpose by ``values[transpose_order]``."""
        transposed, order = self._transpose()
        if order is None:  # only second derivatives come here
            there = transposed.transpose_order
            order = torch.empty_like(there)
            order[there.long()] = torch.arange(self.num_edges, dtype=there.dtype, device=self.device)
            self._kept["transpose"] = (weakref.ref(transposed), order)
        return order

    def _transpose(self) -> tuple["Adjacency", Tensor | None]:
        kept, order = self._kept.get("transpose", (None, None))
        if isinstance(kept, weakref.ref):  # a transpose points back weakly, so that memory is freed at once
            kept = kept()
        if kept is None:
            indptr, order = compress(self.indices, self.num_src)
            destinations = self.destinations.index_select(0, order)
            kept = Adjacency(indptr, destinations, self.num_dst, self.num_src, check=False)
            kept._kept["transpose"] = (weakref.ref(self), None)
            self._kept["transpose"] = (kept, order)
        return kept, order

    def to_transpose(self, weight: Tensor) -> Tensor:
        r"""``weight[transpose_order]``; of a constant weight the result is kept as long as the weight lives.

        Args:
            weight (Tensor): ``[E, *]``.

        Returns:
            Tensor ``[E, *]``, differentiable.
        """
        if weight.requires_grad:
            return weight.index_select(0, self.transpose_order)
        kept = self._kept.get("weight")
        if kept is not None and kept[0]() is weight and kept[1] == weight._version:
            return kept[2]
        permuted = weight.index_select(0, self.transpose_order)
        self._kept["weight"] = (weakref.ref(weight), weight._version, permuted)
        return permuted

    def mean_weight(self, dtype: torch.dtype) -> Tensor:
        r"""``[E]``: one over the degree of each edge's destination."""

        def build() -> Tensor:
            inverse = self.degrees.clamp(min=1).to(torch.float64).reciprocal().to(dtype)
            return inverse.repeat_interleave(self.degrees, output_size=self.num_edges)

        return self._keep(("mean_weight", dtype), build)

    def rows(self, first: int, last: int) -> "Adjacency":
        r"""The edges into destinations ``first..last-1`` alone, from the same sources; a view, not kept."""
        begin, end = self.indptr[[first, last]].tolist()
        indptr = self.indptr[first : last + 1] - begin
        return Adjacency(indptr, self.indices[begin:end], self.num_src, last - first, check=False)

    def split(self, num_owned: int) -> Split:
        r"""The edges from owned sources, and those from the halo, as two adjacencies over all destinations.

        So the interior can be summed while the halo is on its way. The sources of the halo's adjacency are
        counted from zero: they index the received block itself. Made anew at each call.

        Args:
            num_owned (int): How many sources, from the first, are owned.

        Raises:
            GraphError: If there are fewer sources.
        """
        if not 0 <= num_owned <= self.num_src:
            raise GraphError(f"Expected 0..{self.num_src} owned sources, found {num_owned}.")
        is_owned = self.indices < num_owned
        before = torch.zeros(self.num_edges + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(is_owned, 0, out=before[1:])
        owned_indptr = before[self.indptr]
        halves, places = [], []
        for mask, indptr, first, last in (
            (is_owned, owned_indptr, 0, num_owned),
            (~is_owned, self.indptr - owned_indptr, num_owned, self.num_src),
        ):
            place = mask.nonzero().view(-1)
            indices = self.indices[place] - first
            halves.append(Adjacency(indptr, indices, last - first, self.num_dst, check=False))
            places.append(place)
        return Split(halves[0], halves[1], places[0], places[1])

    def torch_csr(self, dtype: torch.dtype = torch.float32) -> Tensor:
        r"""A ``torch.sparse_csr`` matrix of ones ``[num_dst, num_src]``, as PyG's layers take it for
        ``edge_index``.

        Its indices are int64: with int32, ``torch.sparse.mm(..., reduce=...)`` computes silently wrong
        gradients once rows times columns pass ``2**31``.
        """

        def build() -> Tensor:
            ones = torch.ones(self.num_edges, dtype=dtype, device=self.device)
            return torch.sparse_csr_tensor(
                self.indptr,
                self.indices.to(torch.int64),
                ones,
                size=(self.num_dst, self.num_src),
                check_invariants=False,
            )

        return self._keep(("torch_csr", dtype), build)

    def to(self, device: torch.device | str) -> "Adjacency":
        r"""This adjacency on another device; itself if it is there already."""
        if torch.empty(0, device=device).device == self.device:
            return self
        return Adjacency(
            self.indptr.to(device),
            self.indices.to(device),
            self.num_src,
            self.num_dst,
            None if self.edge_ids is None else self.edge_ids.to(device),
            check=False,
        )
