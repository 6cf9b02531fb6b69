r"""Optimisers that update only the rows of the step, each at its owner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partpar.errors import RouteError
from partpar.kernels.whole_rows import whole
from partpar.sharded import swap
from partpar.sharded.checkpoint import ShardedRows, copy_rows, meaning_of, way_from
from partpar.sharded.embedding import DistEmbedding
from partpar.sharded.gradients import Gradients
from partpar.sharded.wanted import nothing

REDUCTIONS = ("sum", "mean")
_SOME_BYTES = 1 << 17  # of rows that are updated at a time: they stay in the cache of a core


class SparseOptimizer(ABC):
    r"""What the optimisers of :class:`DistEmbedding` have in common.

    :meth:`step` brings the gradients noted since the last one to the owners of their rows. There those of one id are
    summed in the order of lookups, ranks and places, so the sum is the same for any number of workers that the ids of a
    lookup are dealt to, one after the other; then the owner updates its rows. Rows without gradient keep their state.

    Args:
        params: The tables.
        lr: Learning rate.
        scale_grad: What every gradient is multiplied by: ``1 / world_size`` where the model beside the table is in
            :class:`~torch.nn.parallel.DistributedDataParallel`, which averages over workers.
        reduction: ``"sum"``, or ``"mean"`` to divide a row's sum by how often the row was looked up in the step.

    Raises:
        RouteError: Arguments do not fit.
    """

    _state_names: tuple[str, ...] = ()

    def __init__(
        self, params: Sequence[DistEmbedding], lr: float = 0.01, scale_grad: float = 1.0, reduction: str = "sum"
    ) -> None:
        name = type(self).__name__
        if not isinstance(params, Iterable):
            raise RouteError(f"{name}: expected a list of tables, found a {type(params).__name__}; write {name}([table])")
        self.params = list(params)
        strange = [type(table).__name__ for table in self.params if not isinstance(table, DistEmbedding)]
        if strange or not self.params or len(set(self.params)) < len(self.params):
            raise RouteError(
                f"{name}: expected different DistEmbedding tables, found {', '.join(strange) or f'{len(self.params)} with repetitions'}"
            )
        if not lr >= 0 or reduction not in REDUCTIONS:
            raise RouteError(
                f"{name}: expected lr of at least 0 and reduction among {', '.join(REDUCTIONS)}, found {lr} and {reduction!r}"
            )
        self.lr, self.scale_grad, self.reduction = lr, scale_grad, reduction
        self.state: list[dict[str, Tensor]] = [
            {"step": torch.zeros((), dtype=torch.int64)}
            | {key: torch.zeros_like(table.weight.local_rows) for key in self._state_names}
            for table in self.params
        ]
        for table in self.params:
            table.learns = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        r"""Forgets the gradients noted since the last step."""
        for table in self.params:
            table.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        r"""Updates the rows that gradients were noted for (collective).

        A rank without any takes part all the same. Nothing is noted any more afterwards.
        """
        for start in range(0, len(self.params), swap.MOST_TENSORS):
            some = slice(start, start + swap.MOST_TENSORS)
            for i, gradients in enumerate(self._bring(self.params[some]), start):
                if gradients is not None:
                    self.state[i]["step"] += 1
                    self._update(i, gradients)
                    gradients.done()

    def _bring(self, tables: Sequence[DistEmbedding]) -> list[Gradients | None]:
        """Sums the tables' gradients at their owners; :obj:`None` for a table that no rank had one for."""
        group, shards = tables[0].weight.group, [table.weight.shard for table in tables]
        found = [Gradients(shard) for shard in shards]
        here, more, reached = 1, 1 << len(tables), np.int64(0)
        while True:  # a round for each lookup since the last step: the ranks' first ones, the second ones, ...
            wanted, values, flags = [], [], 0
            for i, table in enumerate(tables):
                if table.noted:
                    of, grad = table.noted.pop(0)
                    flags |= here << i | (more if table.noted else 0)
                    wanted.append(of)
                    values.append(grad.to("cpu", table.weight.dtype).contiguous())
                else:
                    wanted.append(nothing(table.weight.shard))
                    values.append(table.weight.local_rows[:0])
            arrived = swap.push("step", shards, wanted, values, group, flags=flags)
            for i, gradients in enumerate(found):
                gradients.add(list(arrived.of(i)))
            arrived.done()
            reached |= np.bitwise_or.reduce(arrived.flags)
            if not int(np.bitwise_or.reduce(arrived.flags)) & more:
                return [gradients if int(reached) >> i & 1 else None for i, gradients in enumerate(found)]

    def _update(self, i: int, gradients: Gradients) -> None:
        """Updates the rows of table ``i`` that have a gradient: copies of some at a time, which are written back."""
        shard, state = self.params[i].weight.shard, self.state[i]
        tables = [shard.rows, *(state[key] for key in self._state_names)]
        # All of a room is computed, rows of nobody too: ends that no vector register fills may be rounded otherwise.
        size = (max(1, _SOME_BYTES // shard.row_bytes // 64) * 64, shard.rows.size(1))
        rooms = [torch.zeros(size, dtype=shard.rows.dtype) for _ in range(1 + len(tables))]
        into = [(whole(table), whole(room)) for table, room in zip(tables, rooms[1:], strict=True)]
        for start in range(0, len(gradients.touched), size[0]):
            some = slice(start, start + size[0])
            touched = gradients.touched[some]
            rows = torch.from_numpy(touched)
            gradients.sums(some, rooms[0][: len(rows)], self.scale_grad, self.reduction == "mean")
            for table, room in zip(tables, rooms[1:], strict=True):
                torch.index_select(table, 0, rows, out=room[: len(rows)])
            self._descend(rooms[0], state["step"], *rooms[1:])
            for wholes, copies in into:
                wholes[touched] = copies[: len(touched)]

    @abstractmethod
    def _descend(self, grad: Tensor, step: Tensor, weight: Tensor, *state: Tensor) -> None:
        """Updates rows ``[n, C]`` and their state in place, by torch's formulas."""

    # --- keeping ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        r"""State and learning rate, all as tensors, as :mod:`torch.distributed.checkpoint` saves and fills them in, onto
        any number of workers. Tables go by their place in :obj:`params`."""
        state = {
            str(i): {
                key: value if key == "step" else ShardedRows.of(table.weight.shard, value)
                for key, value in self.state[i].items()
            }
            for i, table in enumerate(self.params)
        }
        meaning = {str(i): meaning_of(table.weight.shard) for i, table in enumerate(self.params)}
        return {"state": state, "meaning": meaning, "lr": torch.tensor(self.lr, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Takes a state over, of :meth:`state_dict` or with whole tensors in it (collective where it was saved by the ids
        of another partition).

        Raises:
            RouteError: Keys, shapes or dtypes do not fit, or it is not known which row is whose.
        """
        for i, table in enumerate(self.params):
            found = state.get("state", {}).get(str(i), {})
            if set(found) != set(self.state[i]):
                raise RouteError(
                    f"{type(self).__name__}: expected {sorted(self.state[i])} for table {i}, found {sorted(found)}"
                )
            way = way_from(state.get("meaning", {}).get(str(i), {}), table.weight.shard, table.weight.group)
            for key, value in self.state[i].items():
                if key == "step":
                    value.copy_(found[key])
                else:
                    copy_rows(found[key], table.weight.shard, value, way)
        self.lr = float(state["lr"])


class SparseSGD(SparseOptimizer):
    r"""Plain gradient descent: :class:`torch.optim.SGD` on the rows of the step.

    Args:
        params, lr, scale_grad, reduction: See :class:`SparseOptimizer`.
    """

    def _descend(self, grad: Tensor, step: Tensor, weight: Tensor) -> None:  # type: ignore[override]
        weight.add_(grad, alpha=-self.lr)


class SparseAdagrad(SparseOptimizer):
    r"""`Adagrad <https://jmlr.org/papers/v12/duchi11a.html>`_: :class:`torch.optim.Adagrad` on the rows of the step.

    Args:
        params, lr, scale_grad, reduction: See :class:`SparseOptimizer`.
        eps: Added to the root of the sum of squares.
    """

    _state_names = ("sum",)

    def __init__(
        self,
        params: Sequence[DistEmbedding],
        lr: float = 0.01,
        eps: float = 1e-10,
        scale_grad: float = 1.0,
        reduction: str = "sum",
    ) -> None:
        super().__init__(params, lr, scale_grad, reduction)
        self.eps = eps

    def _descend(self, grad: Tensor, step: Tensor, weight: Tensor, squares: Tensor) -> None:  # type: ignore[override]
        torch._fused_adagrad_(  # one pass over the rows, where the same in single operations takes six
            [weight], [grad], [squares], [step.float()], lr=self.lr, lr_decay=0.0, weight_decay=0.0, eps=self.eps,
            maximize=False,
        )  # fmt: skip


class SparseAdam(SparseOptimizer):
    r"""`Adam <https://arxiv.org/abs/1412.6980>`_, lazily: :class:`torch.optim.SparseAdam`, whose moments decay only in
    steps that a row takes part in.

    Args:
        params, lr, scale_grad, reduction: See :class:`SparseOptimizer`.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
    """

    _state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Sequence[DistEmbedding],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        scale_grad: float = 1.0,
        reduction: str = "sum",
    ) -> None:
        super().__init__(params, lr, scale_grad, reduction)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise RouteError(f"SparseAdam: expected betas from 0 to below 1, found {betas}")
        self.betas, self.eps = betas, eps

    def _descend(  # type: ignore[override]
        self, grad: Tensor, step: Tensor, weight: Tensor, mean: Tensor, squares: Tensor
    ) -> None:
        # Adam adds eps to the root once that is corrected, SparseAdam before.
        eps = self.eps / (1.0 - self.betas[1] ** int(step)) ** 0.5
        torch._fused_adam_(
            [weight], [grad], [mean], [squares], [], [step.float()], lr=self.lr, beta1=self.betas[0], beta2=self.betas[1],
            weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
