r"""Setting processes up, training loops and metrics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partpar.training.arguments import add_checkpoint_arguments, open_checkpoints
    from partpar.training.checkpoint import Checkpointer
    from partpar.training.full_graph import Epoch, History, evaluate, fit
    from partpar.training.inference import InferenceError, full_graph_inference
    from partpar.training.log import RunLog
    from partpar.training.machine import forget_peak_memory, peak_memory, tune_allocator
    from partpar.training.metrics import JsonLines, accuracy, measure, roc_auc
    from partpar.training.mini_batch import BatchEpoch, BatchHistory, fit_batches, train_epoch
    from partpar.training.scalars import Scalars, ScalarsError
    from partpar.training.setup import Context, SetupError, init
    from partpar.training.summary import batch_summary_table, summary_table
    from partpar.training.together import FirstRankError, all_numbers, all_rows, first_rank

__all__ = [
    "BatchEpoch",
    "BatchHistory",
    "Checkpointer",
    "Context",
    "Epoch",
    "FirstRankError",
    "History",
    "InferenceError",
    "JsonLines",
    "RunLog",
    "Scalars",
    "ScalarsError",
    "SetupError",
    "accuracy",
    "add_checkpoint_arguments",
    "all_numbers",
    "all_rows",
    "batch_summary_table",
    "evaluate",
    "first_rank",
    "fit",
    "fit_batches",
    "forget_peak_memory",
    "full_graph_inference",
    "init",
    "measure",
    "open_checkpoints",
    "peak_memory",
    "roc_auc",
    "summary_table",
    "train_epoch",
    "tune_allocator",
]

_ROOMS = {
    "arguments": ("add_checkpoint_arguments", "open_checkpoints"),
    "checkpoint": ("Checkpointer",),
    "full_graph": ("Epoch", "History", "evaluate", "fit"),
    "inference": ("InferenceError", "full_graph_inference"),
    "log": ("RunLog",),
    "machine": ("forget_peak_memory", "peak_memory", "tune_allocator"),
    "metrics": ("JsonLines", "accuracy", "measure", "roc_auc"),
    "mini_batch": ("BatchEpoch", "BatchHistory", "fit_batches", "train_epoch"),
    "scalars": ("Scalars", "ScalarsError"),
    "setup": ("Context", "SetupError", "init"),
    "summary": ("batch_summary_table", "summary_table"),
    "together": ("FirstRankError", "all_numbers", "all_rows", "first_rank"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    r"""Imports a name when it is first used: who trains embeddings alone is spared PyG and a compiler, 300 MB."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"partpar.training.{_ROOM_OF[name]}"), name)
