r"""Batches made in processes of their own, for transforms that hold the interpreter's lock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from partpar.sampling.batches import Batch, BatchMaker, Recipe, Task
from partpar.sampling.relay import Address, Relay, RelayedService
from partpar.serving.service import Service


class _Made(Dataset[Batch]):
    """In a worker process: the batch of a task. Connects when it is first asked."""

    def __init__(self, address: Address, recipe: Recipe, transform: Callable[[Any], Any] | None) -> None:
        self.address, self.recipe, self.transform = address, recipe, transform
        self._maker: BatchMaker | None = None

    def __getitem__(self, task: Task) -> Batch:
        if self._maker is None:
            self._maker = BatchMaker(RelayedService(self.address), self.recipe)
        batch = self._maker(task)
        return batch if self.transform is None else self.transform(batch)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _one_thread(number: int) -> None:
    torch.set_num_threads(1)


class InProcesses:
    r"""Spawned processes that make batches. What one of them raises is raised where its batch would have come, and so is
    the end of one that dies.

    Args:
        service: Answers for the graph, in this process.
        recipe: What to make.
        transform: Applied to each batch there; to be found by name in an importable module.
        num_workers: How many.
        prefetch_factor: Batches under way in each.
        timeout: Seconds that a batch may take.
    """

    def __init__(
        self,
        service: Service,
        recipe: Recipe,
        transform: Callable[[Any], Any] | None,
        num_workers: int,
        prefetch_factor: int,
        timeout: float,
    ) -> None:
        self._relay = Relay(service)
        self._dataset = _Made(self._relay.address, recipe, transform)
        self._options = {"num_workers": num_workers, "prefetch_factor": prefetch_factor, "timeout": timeout}
        self._tasks: list[Task] = []
        self._loader: DataLoader[Batch] | None = None

    def run(self, tasks: list[Task], persistent: bool) -> _Running:
        r"""Begins an epoch."""
        self._tasks[:] = tasks
        if self._loader is None or not persistent:
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._tasks,
                collate_fn=_as_it_is,
                worker_init_fn=_one_thread,
                multiprocessing_context="spawn",
                persistent_workers=persistent,
                **self._options,  # type: ignore[arg-type]
            )
        return _Running(iter(self._loader), persistent)

    def close(self) -> None:
        r"""Ends processes and relay. May be called again."""
        loader, self._loader = self._loader, None
        if loader is not None and loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._relay.close()


class _Running(Iterator[Batch]):
    def __init__(self, batches: Any, persistent: bool) -> None:
        self._batches, self._persistent = batches, persistent

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None and not self._persistent:
            with contextlib.suppress(AttributeError):
                batches._shutdown_workers()
