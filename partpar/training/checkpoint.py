r"""Checkpoints: a training's whole state, kept while it goes on, and found again after whatever ended it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from partpar import exchange
from partpar.agreement import digest
from partpar.errors import CheckpointError, DamagedCheckpointError
from partpar.sharded.checkpoint import ShardedRows
from partpar.training import checkpoint_files as files
from partpar.training.checkpoint_state import RANDOM, VALUES, collect, drawn_by, hand_out, wanted
from partpar.training.together import first_rank, side_group

_LAST_WAIT = 10.0  # seconds that a checkpoint under way gets when a training ends by an error


class Checkpointer:
    r"""Keeps the state of a training in a folder, and goes on from there (collective: all ranks make it, save, resume and
    close it alike).

    .. code-block:: python

        state = {"model": model, "optimizer": optimizer, "loader": loader}
        with Checkpointer("checkpoints", state, worker.group, every=5, resume=True) as kept:
            found = kept.resume() or {"best": 0.0}         # what save was given beside the state
            for epoch in range(kept.step + 1, epochs + 1):
                ...
                kept.save(epoch, best=best)                # every fifth

    A save copies the state and returns; a thread writes the copy by :mod:`torch.distributed.checkpoint` while training
    goes on. Each rank writes some: its own rows of what is sharded, and a part of what all have alike. A checkpoint appears
    under its name only when it is whole and on the disk; a kill at any moment leaves the ones before. Tensors are kept as
    safetensors and all else as JSON with checksums beside: no pickle is written or read.

    Rows of :class:`~partpar.sharded.DistEmbedding` and :class:`~partpar.sharded.DistTensor` and the state of their
    optimisers go by id, and all else is alike on all ranks, so training may go on with another number of workers and
    another partition. The generators of torch, NumPy and Python are kept for each rank; a further rank gets a
    stream of its own.

    Args:
        folder: Where checkpoints are kept, on a file system that all workers share; :obj:`None` keeps nothing.
        state: Objects by name: modules, in :class:`~torch.nn.parallel.DistributedDataParallel` or not, optimisers,
            schedulers, loaders, generators, or whatever has ``state_dict()`` and ``load_state_dict()`` of tensors and plain
            values. But for tensors of :mod:`partpar.sharded`, states must be alike on all ranks.
        group: The process group; by default all processes.
        keep: How many checkpoints to keep.
        every: Which steps :meth:`save` keeps: multiples of this.
        resume: Whether to go on from what is there. Without it, a folder with checkpoints is refused.
        asynchronous: Whether :meth:`save` returns before the checkpoint is written.
        timeout: Seconds that a worker may take for its part of a checkpoint.

    Raises:
        CheckpointError: Arguments do not fit, another run writes to the folder, or there are checkpoints and no
            :obj:`resume`; on every rank.
    """

    def __init__(
        self,
        folder: str | Path | None,
        state: Mapping[str, Any] | None = None,
        group: ProcessGroup | None = None,
        keep: int = 3,
        every: int = 1,
        resume: bool = False,
        asynchronous: bool = True,
        timeout: float = 600.0,
    ) -> None:
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise CheckpointError(f"{name}: expected at least 1, found {value}")
        self.folder = None if folder is None else Path(folder)
        self.step, self.every, self._keep, self._asynchronous = 0, every, keep, asynchronous
        self._state: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}
        self._lock: IO[str] | None = None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._steps: list[int] = []
        self.track(**(state or {}))
        if self.folder is None:
            return
        self._own = exchange.own_group(group)
        self._rank, self._world_size = exchange.rank_and_size(self._own)
        self._writers = None if self._own is None else side_group(self._own, "checkpoints", timeout)
        self._steps = first_rank(self._open, self._own)
        if self._steps and not resume:
            self._release()
            raise CheckpointError(
                f"{self.folder}: expected no checkpoints of an earlier run, found them up to step {self._steps[-1]}; "
                "go on from there with resume=True (--resume), or choose another folder"
            )

    def _open(self) -> list[int]:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = files.lock(self.folder)
        files.clean(self.folder)
        return files.steps_in(self.folder)

    def track(self, **state: Any) -> None:
        r"""Adds objects to the state, before :meth:`resume`.

        Raises:
            CheckpointError: A name is taken.
        """
        for name, thing in state.items():
            if name in self._state or name in (VALUES, RANDOM) or "/" in name:
                raise CheckpointError(f"state: expected a name that is not taken and has no '/', found {name!r}")
            self._state[name] = thing.module if isinstance(thing, DistributedDataParallel) else thing

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, step: int, force: bool = False, **values: Any) -> bool:
        r"""Keeps the state after a step (collective), and waits for the checkpoint before, if that is still being written.

        Args:
            step: Its number, such as that of the epoch; higher than the last one's.
            force: Keep it even if it is no multiple of :obj:`every`.
            **values: Plain values and tensors to keep besides, alike on all ranks; :meth:`resume` returns them.

        Returns:
            Whether it was kept.

        Raises:
            CheckpointWriteError: This checkpoint, or with :obj:`asynchronous` the one before, could not be written; on
                every rank. The one before that stands.
            RankLostError: A rank is gone, or was later than :obj:`timeout` with its part.
            CheckpointError: There is something in the state that cannot be kept.
            AgreementError: Ranks have different states.
        """
        if self.folder is None or not (force or step % self.every == 0):
            return False
        self.wait()
        error = None if step > self.step else f"expected a step after {self.step}, found {step}"
        if self._steps:
            error = f"expected resume() before the first save, since there is a checkpoint of step {self._steps[-1]}"
        tree: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        try:
            tree, tensors = collect(self._state, values)
        except CheckpointError as wrong:
            error = str(wrong)
        layout = [f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items()]
        self._agree(f"save of step {step}", {"step": step, "state": digest(str(tree), *layout)}, error)
        tensors |= drawn_by(self._rank)
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        self.step = step
        self._thread = Thread(target=self._write, args=(step, tree, copies), name="partpar-checkpoint", daemon=True)
        self._thread.start()
        if not self._asynchronous:
            self.wait()
        return True

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """What the thread writes: the training goes on to change the tensor itself. Buffers serve again."""
        source = tensor.local if isinstance(tensor, ShardedRows) else tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = self._buffers[name] = torch.empty(source.shape, dtype=source.dtype)
        buffer.copy_(source)
        return ShardedRows(tensor.shape, buffer, tensor.first_id) if isinstance(tensor, ShardedRows) else buffer

    def _write(self, step: int, tree: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert self.folder is not None
        from partpar.training.checkpoint_storage import write  # takes memory that training can do without

        try:
            write(self.folder, step, tree, tensors, self._writers, self._keep)
        except BaseException as error:  # noqa: BLE001 - it is raised where the checkpoint is awaited
            self._failure = error
            if self._rank == 0:
                shutil.rmtree(files.partial_folder(self.folder, step), ignore_errors=True)

    def wait(self) -> None:
        r"""Waits until the checkpoint under way is written.

        Raises:
            CheckpointWriteError: It could not be; on every rank.
            RankLostError: A rank is gone, or was later than :obj:`timeout` with its part.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # --- going on ---------------------------------------------------------------------------------------------------

    def resume(self) -> dict[str, Any] | None:
        r"""Takes the state of the newest checkpoint that is whole over (collective). :attr:`step` is then its step.

        A damaged one is passed over with a warning, and renamed once an older one is found whole.

        Returns:
            The values that :meth:`save` was given, or :obj:`None` if there is no checkpoint.

        Raises:
            DamagedCheckpointError: There are checkpoints, and all are damaged; on every rank.
            CheckpointError: The state kept is of other objects, or does not fit them; on every rank.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._steps):
            assert self.folder is not None
            manifest: files.Manifest | None = None
            error: str | None = None
            try:
                manifest = files.open_checkpoint(self.folder, step, self._rank, self._world_size)
            except DamagedCheckpointError as wrong:
                error = str(wrong)
            try:
                exchange.agree(self._own, f"checkpoint of step {step}", {}, error, DamagedCheckpointError)
            except DamagedCheckpointError as told:
                damaged[step] = str(told)
                if self._rank == 0:
                    warnings.warn(f"passed over the checkpoint of step {step}: {told}", stacklevel=2)
                continue
            assert manifest is not None
            values = self._load(manifest)
            if self._rank == 0:
                for other in damaged:
                    files.set_aside(self.folder, other)
            self.step, self._steps = step, []
            return values
        if damaged:
            troubles = "; ".join(damaged.values())
            raise DamagedCheckpointError(
                f"{self.folder}: expected a whole checkpoint, found {len(damaged)} damaged ones ({troubles}); restore one, or "
                "choose another folder to begin anew"
            )
        return None

    def _load(self, manifest: files.Manifest) -> dict[str, Any]:
        from partpar.training.checkpoint_storage import read

        assert self.folder is not None
        what = f"resume from step {manifest.step}"
        into: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        error: str | None = None
        try:
            into = wanted(self._state, manifest, self._rank)
        except CheckpointError as wrong:
            error = str(wrong)
        self._agree(what, {}, error)
        read(self.folder, manifest, {name: tensor for name, tensor in into.items() if tensor.numel()}, self._writers)
        try:
            values = hand_out(self._state, manifest, into, self._rank)
        except CheckpointError as wrong:
            error = str(wrong)
        self._agree(what, {}, error)
        return values

    def _agree(self, what: str, fields: dict[str, int], error: str | None) -> None:
        exchange.agree(self._own, what, fields, error, lambda told: CheckpointError(f"{self.folder}: {what}: {told}"))

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        r"""Waits for what is under way, and lets other runs write to the folder. May be called again.

        Raises:
            CheckpointWriteError: As by :meth:`wait`.
        """
        try:
            self.wait()
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # Other ranks may be gone: what is under way is given some time, and no error of its own hides the first.
        if self._thread is not None:
            self._thread.join(_LAST_WAIT)
        self._release()
