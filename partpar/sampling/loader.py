r"""What all loaders have in common: epochs, steps that all ranks agree on, and batches under way."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from partpar import exchange
from partpar.agreement import digest
from partpar.errors import RouteError, SamplingError, StaleIteratorError
from partpar.sampling.batches import Batch, BatchMaker, Recipe, Task
from partpar.sampling.inputs import UNEVEN, Steps, shuffled
from partpar.sampling.processes import InProcesses
from partpar.sampling.threads import InOrder
from partpar.serving.service import Service

TIMEOUT = 60.0


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    r"""What is wrong with one rank's own seeds raises on every rank, by that rank's name (collective)."""
    group = exchange.own_group()
    wrong: RouteError | SamplingError | None = None
    try:
        yield
    except (RouteError, SamplingError) as error:
        wrong = error
    if group is None and wrong is not None:
        raise wrong

    def told_to_all(told: str) -> Exception:
        error = (SamplingError if wrong is None else type(wrong))(f"{what}: {told}")
        error.__cause__ = wrong
        return error

    exchange.agree(group, what, {}, None if wrong is None else str(wrong), told_to_all)


class DistLoader:
    r"""Yields batches, epoch after epoch; the base of :class:`~partpar.sampling.DistNeighborLoader` and
    :class:`~partpar.sampling.DistLinkNeighborLoader`.

    A batch depends on :obj:`seed`, the epoch, its number in it and its seeds, and on nothing else: not on the number of
    parts, workers, threads or processes. Several batches are under way while one is trained on; their sampling, the
    fetching of their attributes and the training overlap.

    A loader is a context manager; :meth:`close` ends it. One that is dropped closes itself.

    Args:
        service: Answers for the whole graph.
        recipe: What batches are.
        batch_size (int): Seeds of a batch. (default: :obj:`1`)
        shuffle (bool): Whether each epoch has an order of its own, drawn from seed and epoch. (default: :obj:`False`)
        drop_last (bool): Leave out what fills no batch; all ranks end with the one that has the fewest. (default:
            :obj:`False`)
        uneven (str): How ranks with unequal numbers of seeds make equally many steps: ``"split"``: who has fewer batches
            makes smaller ones, so that every seed comes once; ``"pad"``: begins again with its first seeds; ``"stop"``: all
            end with the one that is through first. (default: :obj:`"split"`)
        num_workers (int): Processes that make batches; with 0, threads of this one do. Kernels release the interpreter's
            lock, so processes only pay for a :obj:`transform` in Python, with ``filter_per_worker=True``. They are
            spawned, never forked, and hold nothing of the graph. (default: :obj:`0`)
        prefetch_factor (int): Batches under way for each thread or process. (default: :obj:`2`)
        concurrency (int): Threads that make batches; with 0, each is made when it is asked for. (default: :obj:`1`)
        persistent_workers (bool): Keep processes from epoch to epoch. (default: :obj:`False`)
        transform (callable, optional): Applied to each batch.
        filter_per_worker (bool, optional): Whether :obj:`transform` runs in the thread or process that makes the batch, or
            in the training thread. (default: :obj:`False`)
        sampler (optional): Yields positions of seeds for an epoch, instead of :obj:`shuffle`.
        device (optional): Where batches are moved to.
        timeout (float): Seconds that a process may take for a batch; a part, for an answer. (default: :obj:`60`)
        **kwargs: What :class:`torch.utils.data.DataLoader` takes besides. ``pin_memory``, ``generator``, ``worker_init_fn``
            and ``multiprocessing_context`` are accepted and mean nothing here.

    Raises:
        SamplingError: Arguments do not fit; on every rank where the mistake is seen by all.
    """

    def __init__(
        self,
        service: Service,
        recipe: Recipe,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        uneven: str = "split",
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        concurrency: int = 1,
        persistent_workers: bool = False,
        transform: Callable[[Any], Any] | None = None,
        filter_per_worker: bool | None = None,
        sampler: Any = None,
        device: torch.device | str | None = None,
        timeout: float = 0,
        **kwargs: Any,
    ) -> None:
        strange = set(kwargs) - {"pin_memory", "generator", "worker_init_fn", "multiprocessing_context", "pin_memory_device"}
        if strange:
            raise TypeError(f"{type(self).__name__}: unexpected arguments {sorted(strange)}")
        prefetch_factor = 2 if prefetch_factor is None else prefetch_factor
        for name, value, low in (
            ("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("prefetch_factor", prefetch_factor, 1),
            ("concurrency", concurrency, 0),
        ):  # fmt: skip
            if value < low:
                raise SamplingError(f"{name}: expected at least {low}, found {value}")
        if uneven not in UNEVEN:
            raise SamplingError(f"uneven: expected one of {', '.join(UNEVEN)}, found {uneven!r}")
        if shuffle and sampler is not None:
            raise SamplingError("expected shuffle or a sampler, found both")
        self.service, self.batch_size, self.shuffle, self.drop_last = service, batch_size, shuffle, drop_last
        self.num_workers, self.prefetch_factor, self.concurrency = num_workers, prefetch_factor, concurrency
        self.persistent_workers = persistent_workers
        self.transform, self.filter_per_worker = transform, bool(filter_per_worker)
        self.device, self.timeout = device, timeout or TIMEOUT
        self.pid, self.epoch = os.getpid(), 0
        self._first = 0  # batch that the next epoch begins with
        self._order, self._running = sampler, None  # type: Any, Any
        self._maker = BatchMaker(service, recipe)
        self._processes: InProcesses | None = None
        self._closers: list[Callable[[], None]] = []
        self.count = recipe.columns["input_id"].numel()
        self.steps = self._agree_on_steps(uneven)

    def _agree_on_steps(self, uneven: str) -> Steps:
        """Compares notes with the other ranks (collective); alone, there is nobody to fall out of step with."""
        group = exchange.own_group()
        rank, _ = exchange.rank_and_size(group)
        recipe = self._maker.recipe
        fields = {
            "kind of inputs, fan-outs and what else is sampled": digest(recipe.kind, sorted(recipe.options.items())),
            "attributes": digest(sorted((str(kind), sorted(names)) for kind, names in recipe.names.items())),
            "negatives": digest(recipe.negatives, recipe.strict),
            "batch_size": self.batch_size, "shuffle": int(self.shuffle), "drop_last": int(self.drop_last),
            "uneven": UNEVEN.index(uneven), "seed": recipe.seed, "_seeds": self.count,
        }  # fmt: skip
        what = f"{type(self).__name__}(num_neighbors={recipe.options.get('num_neighbors')})"
        told = exchange.agree(group, what, fields)
        counts = [other["_seeds"] for other in told]
        return Steps.agree(counts, rank, self.batch_size, self.drop_last, uneven)

    # --- iteration --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.steps.steps

    def set_epoch(self, epoch: int) -> None:
        r"""Sets the number of the next epoch; otherwise each :func:`iter` begins the next one, from 0."""
        self.epoch, self._first = epoch, 0

    def state_dict(self) -> dict[str, int]:
        r"""Where the loader stands: the epoch, and how many of its batches were read. With the seed that is all that the
        batches to come depend on."""
        running = None if self._running is None else self._running()
        epoch, batch = (self.epoch, self._first) if running is None or not running.under_way else running.place
        if batch >= len(self) > 0:
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "steps": len(self), "seed": self._maker.recipe.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        r"""Goes on from where a loader stood; one that is being read ends.

        Raises:
            SamplingError: Its seed was another; or it stood within an epoch of as many batches as this one does not have,
                since then its seeds were dealt to other batches.
        """
        seed = self._maker.recipe.seed
        if state["seed"] != seed:
            raise SamplingError(f"seed: expected that of the state, {state['seed']}, found {seed}")
        if state["batch"] and state["steps"] != len(self):
            raise SamplingError(
                f"expected an epoch of {state['steps']} batches, of which {state['batch']} were read, found one of "
                f"{len(self)}; go on with as many workers, or from the end of an epoch"
            )
        self._stop()
        self.epoch, self._first = state["epoch"], state["batch"]

    def tasks(self, epoch: int, first: int = 0) -> Iterator[Task]:
        r"""The batches of an epoch, unmade; but for those before the :obj:`first`."""
        if self._order is not None:
            order = torch.as_tensor(list(self._order), dtype=torch.int64)
        else:
            order = shuffled(self.count, self._maker.recipe.seed, epoch) if self.shuffle else torch.arange(self.count)
        for number in range(first, len(self)):
            places = self.steps.bounds(number)
            at = torch.arange(places.start, places.stop)
            yield Task(epoch, number, order[at % self.count] if self.count else at)

    def __iter__(self) -> Iterator[Batch]:
        r"""Begins the next epoch. A loader is read once at a time: an iterator that was not at its end raises
        :class:`~partpar.errors.StaleIteratorError` from now on."""
        self._stop(anew=True)
        epoch, self.epoch = self.epoch, self.epoch + 1
        first, self._first = self._first, 0
        tasks = self.tasks(epoch, first)
        made: Any
        ahead = self.prefetch_factor * max(self.num_workers or self.concurrency, 1)
        if self.num_workers:
            if self._processes is None:
                transform = self.transform if self.filter_per_worker else None
                self._processes = InProcesses(
                    self.service, self._maker.recipe, transform, self.num_workers, self.prefetch_factor, self.timeout
                )
            made = self._processes.run(list(tasks), self.persistent_workers)
        elif self.concurrency:
            made = InOrder(self._make, tasks, self.concurrency, ahead)
        else:
            made = (self._make(task) for task in tasks)
        running = _Epoch(made, self._finish, epoch, first)
        self._running = weakref.ref(running)  # who reads it owns it: dropped half-way, it ends at once
        return running

    def _stop(self, anew: bool = False) -> None:
        running = None if self._running is None else self._running()
        self._running = None
        if running is not None:
            running.close(stale=anew and running.place[1] < len(self))

    def _make(self, task: Task) -> Batch:
        batch = self._maker(task)
        return self.transform(batch) if self.transform is not None and self.filter_per_worker else batch

    def _finish(self, batch: Batch) -> Batch:
        if self.transform is not None and not self.filter_per_worker:
            batch = self.transform(batch)
        return batch if self.device is None else batch.to(self.device)

    def __call__(self, index: Tensor | list[int]) -> Batch:
        r"""The batch of some seeds, by their places among the inputs, as the first of epoch 0."""
        return self._finish(self._make(Task(0, 0, torch.as_tensor(index, dtype=torch.int64))))

    def ids_of(self, raw_ids: Tensor, node_type: str | None = None) -> Tensor:
        r"""Ids in the partition of nodes that batches name by raw ids, for rows that live with a share's nodes:
        ``emb(loader.ids_of(batch.n_id))``. Any rank may ask at any time.

        Args:
            raw_ids: ``[n]`` int64.
            node_type: Whose; may be left out where there is one type.

        Returns:
            ``[n]`` int64.

        Raises:
            SamplingError: There are several types, and none is named.
            IdError: No node has such a raw id.
        """
        types = self.service.share.node_types
        if node_type is None and len(types) > 1:
            raise SamplingError(f"ids_of: expected a node type of {types}, found none; name one")
        return self.service.ids_of(node_type or types[0], raw_ids)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        r"""Ends threads and processes, and the service if the loader started it and is its last user. Where the service
        speaks to other ranks, these should close theirs too. May be called again."""
        self._stop()
        if self._processes is not None:
            self._processes.close()
            self._processes = None
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # the others may be waiting for what will not come: wait for none of them
            self.service.transport.abandon()
        self.close()

    def __del__(self) -> None:
        processes = getattr(self, "_processes", None)
        if processes is not None:
            with contextlib.suppress(Exception):  # the interpreter may be half gone
                processes.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pid={self.pid})"

    # --- what PyG's loaders offer besides ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def enable_multithreading(self, worker_threads: int | None = None) -> Iterator[None]:
        r"""Means nothing here: kernels have their threads. Accepted for scripts that call it."""
        yield

    @contextlib.contextmanager
    def enable_cpu_affinity(self, loader_cores: Any = None) -> Iterator[None]:
        r"""Means nothing here. Accepted for scripts that call it."""
        yield


class _Epoch(Iterator[Batch]):
    """The batches of an epoch, each finished in the thread that reads them."""

    def __init__(self, made: Any, finish: Callable[[Batch], Batch], epoch: int, first: int) -> None:
        self._made, self._finish = made, finish
        self.place = (epoch, first)
        self._stale = False

    @property
    def under_way(self) -> bool:
        return self._made is not None

    def __next__(self) -> Batch:
        if self._stale:
            raise StaleIteratorError(
                f"this loader was iterated anew; expected no more reads of epoch {self.place[0]}, of which {self.place[1]} batches "
                "were read, found one; end a pass before the next, or make a loader for each"
            )
        if self._made is None:
            raise StopIteration
        batch = self._finish(next(self._made))
        self.place = (self.place[0], self.place[1] + 1)
        return batch

    def close(self, stale: bool = False) -> None:
        made, self._made = self._made, None
        self._stale = self._stale or (stale and made is not None)
        if made is not None:
            made.close()
