r"""An adjacency as the sparse matrix that PyG's layers take for ``edge_index``, multiplied by our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.aggregate import aggregate_max, aggregate_mean, aggregate_min, aggregate_sum

_REDUCTIONS = {
    "sum": aggregate_sum,
    "mean": aggregate_mean,
    "amax": aggregate_max,
    "max": aggregate_max,
    "amin": aggregate_min,
    "min": aggregate_min,
}
_PRODUCTS = (torch.sparse.mm, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class AdjacencyMatrix(Tensor):
    r"""The matrix ``[num_dst, num_src]`` of ones at the edges, as ``adj_t`` for
    :meth:`torch_geometric.nn.MessagePassing.propagate`: a layer that defines ``message_and_aggregate`` by
    :func:`torch_geometric.utils.spmm`, ``@`` or :func:`torch.sparse.mm` runs on the kernels of
    :mod:`partpar.kernels.aggregate`; any other use sees a ``torch.sparse_csr`` tensor.

    Args:
        adj: A share's edges.
        dtype: Of the ones.
    """

    adj: Adjacency
    layout = torch.sparse_csr

    @staticmethod
    def __new__(
        cls: type[AdjacencyMatrix], adj: Adjacency, dtype: torch.dtype = torch.float32
    ) -> AdjacencyMatrix:
        shape = (adj.num_dst, adj.num_src)
        self: AdjacencyMatrix = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=adj.device)
        self.adj = adj
        return self

    def to_torch(self) -> Tensor:
        r"""The plain ``torch.sparse_csr`` tensor."""
        return self.adj.torch_csr(self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AdjacencyMatrix({self.adj.num_dst} x {self.adj.num_src}, {self.adj.num_edges} edges)"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and isinstance(args[0], AdjacencyMatrix):
            return args[0]._times(*args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        plain = [a.to_torch() if isinstance(a, AdjacencyMatrix) else a for a in args]
        return func(*plain, **(kwargs or {}))

    def _times(self, other: Tensor, reduce: str = "sum") -> Tensor:
        if reduce not in _REDUCTIONS:
            raise GraphError(f"expected a reduction of {', '.join(_REDUCTIONS)}, found {reduce!r}")
        if other.dim() == 1:
            return _REDUCTIONS[reduce](self.adj, other.unsqueeze(1)).squeeze(1)
        return _REDUCTIONS[reduce](self.adj, other)
