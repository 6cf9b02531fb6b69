r"""Tensors with a row for each node that no worker holds whole, and embeddings trained on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from partpar.sharded.embedding import DistEmbedding, lookup
from partpar.sharded.initializers import Constant, Normal, Uniform, xavier_uniform
from partpar.sharded.optim import SparseAdagrad, SparseAdam, SparseOptimizer, SparseSGD
from partpar.sharded.policy import PartPolicy, edge_policy, even_policy, node_policy
from partpar.sharded.split import edge_split, node_split
from partpar.sharded.tensor import DistTensor

if TYPE_CHECKING:
    from partpar.sharded.one_sided import OneSided, RowService, serve_rows

__all__ = [
    "Constant",
    "DistEmbedding",
    "DistTensor",
    "Normal",
    "OneSided",
    "PartPolicy",
    "RowService",
    "SparseAdagrad",
    "SparseAdam",
    "SparseOptimizer",
    "SparseSGD",
    "Uniform",
    "edge_policy",
    "edge_split",
    "even_policy",
    "lookup",
    "node_policy",
    "node_split",
    "serve_rows",
    "xavier_uniform",
]


def __getattr__(name: str) -> Any:
    r"""Imports what the remote service is for when it is first used: most programs are spared its memory."""
    if name not in ("OneSided", "RowService", "serve_rows"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("partpar.sharded.one_sided"), name)
