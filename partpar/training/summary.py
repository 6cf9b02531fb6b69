r"""A training's end as a table."""

from __future__ import annotations

from rich.table import Table

from partpar.training.full_graph import History
from partpar.training.mini_batch import BatchHistory

_NAMES = {"accuracy": "accuracy", "auc": "ROC AUC"}


def summary_table(history: History, metric: str = "accuracy", title: str = "") -> Table:
    r"""Returns a table of what a training reached and cost: metric by split, epoch time, exchange, memory.

    Args:
        history: As :func:`~partpar.training.fit` returns it.
        metric: What was measured, for the heading.
        title: Above the table.
    """
    table = Table("what", "value", title=title or None)
    best = history.best
    if best is not None:
        name = _NAMES[metric]
        for split in ("train", "val", "test"):
            table.add_row(f"{name}, {split}", f"{getattr(best, split):.4f}")
        table.add_row("best epoch", f"{best.epoch} of {len(history.epochs)}")
        table.add_row("last loss", f"{history.epochs[-1].loss:.6f}")
        table.add_row("epoch time (median)", f"{1000 * history.epoch_seconds:.1f} ms")
    for rank, (share, peak) in enumerate(zip(history.exchange_share, history.peak_bytes, strict=True)):
        table.add_row(f"rank {rank}: time in exchange", f"{100 * share:.1f} %")
        _add_memory(table, rank, peak)
    return table


def batch_summary_table(history: BatchHistory, metric: str = "accuracy", title: str = "") -> Table:
    r"""The same of a training on batches, with what was measured after its best epoch.

    Args:
        history: As :func:`~partpar.training.fit_batches` returns it.
        metric: What was measured, for the heading.
        title: Above the table.
    """
    table = Table("what", "value", title=title or None)
    for split, score in history.best_scores.items():
        table.add_row(f"{_NAMES[metric]}, {split}", f"{score:.4f}")
    if history.epochs:
        table.add_row("best epoch", f"{history.best} of {len(history.epochs)}")
        table.add_row("last loss", f"{history.epochs[-1].loss:.6f}")
        table.add_row("seeds per second (median)", f"{history.seeds_per_second:,.0f}")
    for rank, peak in enumerate(history.peak_bytes):
        _add_memory(table, rank, peak)
    return table


def _add_memory(table: Table, rank: int, peak: int) -> None:
    table.add_row(f"rank {rank}: peak memory", f"{peak / 2**20:.0f} MiB")
