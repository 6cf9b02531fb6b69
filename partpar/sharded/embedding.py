r"""Embeddings whose rows live with their owners and are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar.errors import RouteError
from partpar.graph import GraphData
from partpar.sharded import swap
from partpar.sharded.checkpoint import ShardedRows, copy_rows, meaning_of, way_from
from partpar.sharded.initializers import InitFunc
from partpar.sharded.policy import PartPolicy
from partpar.sharded.tensor import DistTensor, check_ids
from partpar.sharded.wanted import Wanted


class DistEmbedding(torch.nn.Module):
    r"""A table of rows that are learned, of which each worker keeps some; arguments as in DGL's ``DistEmbedding``.

    .. code-block:: python

        emb = DistEmbedding(num_nodes, 64, "nodes", Normal(std=0.1), part_policy=share)
        optimizer = SparseAdam([emb], lr=0.01)
        loss_of(model(emb(ids), ...)).backward()
        optimizer.step()

    It has no parameter: the rows are no worker's whole, and :class:`~torch.nn.parallel.DistributedDataParallel` leaves
    them alone. Once an optimiser has the table, a backward pass notes the gradients of the rows that were looked up, and the next
    :meth:`SparseOptimizer.step <partpar.sharded.SparseOptimizer.step>` takes them all to their owners; nothing is noted
    of what no backward pass reaches, and :meth:`zero_grad` forgets. Saving and loading work through the module's
    ``state_dict`` by :mod:`torch.distributed.checkpoint`.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Entries of each.
        name: See :class:`DistTensor`.
        init_func: First values; :obj:`None` means zeros.
        part_policy: Which worker keeps which rows, see :class:`DistTensor`.
        dtype: float32 or float64.
        group: The process group; by default all processes.

    Raises:
        RouteError, AgreementError: As by :class:`DistTensor`.

    Shapes:
        - **inputs:** ids :math:`(n)`
        - **outputs:** :math:`(n, D)`
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        name: str | None = None,
        init_func: InitFunc | None = None,
        part_policy: PartPolicy | Tensor | Sequence[int] | GraphData | None = None,
        dtype: torch.dtype = torch.float32,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise RouteError(f"DistEmbedding: expected dtype float32 or float64, found {dtype}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = DistTensor((num_embeddings, embedding_dim), dtype, name, init_func, part_policy, group=group)
        self.learns = False  # whether an optimiser takes what is noted
        self.noted: list[tuple[Wanted, Tensor]] = []  # rows and gradient of each backward pass since the last step

    @property
    def name(self) -> str:
        return self.weight.name

    def forward(self, ids: Tensor) -> Tensor:
        r"""Looks rows up (collective).

        Args:
            ids: ``[n]`` integers, in any order, repeated or none; other for each rank.

        Returns:
            ``[n, D]`` on the device of :obj:`ids`, with gradient where gradients are on.

        Raises:
            IdError: An id is out of range; on its rank. Others raise a :class:`RouteError` that names that rank.
        """
        return lookup({self: ids})[self]

    def zero_grad(self, set_to_none: bool = True) -> None:
        r"""Forgets the gradients noted."""
        self.noted.clear()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, name={self.name!r}, {len(self.weight.local_rows)} here"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = ShardedRows.of(self.weight.shard)
        destination.update({prefix + name: told for name, told in meaning_of(self.weight.shard).items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing_keys, _, error_msgs = args
        if prefix + "weight" not in state_dict:
            missing_keys.append(prefix + "weight")
            return
        try:
            told = {name: state_dict.get(prefix + name) for name in ("numbering", "raw_ids")}
            way = way_from(told, self.weight.shard, self.weight.group)
            copy_rows(state_dict[prefix + "weight"], self.weight.shard, way=way)
        except RouteError as error:
            error_msgs.append(str(error))


def lookup(ids_of: Mapping[DistEmbedding, Tensor]) -> dict[DistEmbedding, Tensor]:
    r"""Looks rows of several tables up in one exchange (collective).

    Args:
        ids_of: For each table the ids, as for :meth:`DistEmbedding.forward`; the same tables in the same order on every
            rank, all of one process group.

    Returns:
        For each table ``[n, D]``.

    Raises:
        RouteError: Something is no table, tables are of different groups, or ids do not fit; on every rank.
    """
    tables, no_table = [], None
    for table in ids_of:
        if isinstance(table, DistEmbedding):
            tables.append(table)
        else:
            told = f"found a {type(table).__name__}; rows of a DistTensor are tensor[ids]"
            no_table = no_table or RouteError(f"lookup: expected {{DistEmbedding: ids}}, {told}")
    if no_table is not None and not tables:  # else the exchange below tells it on every rank
        raise no_table
    if len({id(table.weight.group) for table in tables}) > 1:
        raise RouteError("lookup: expected tables of one process group, found several; look each group's up by itself")
    found: dict[DistEmbedding, Tensor] = {}
    for start in range(0, len(tables), swap.MOST_TENSORS):
        some, error, checked = tables[start : start + swap.MOST_TENSORS], no_table, []
        for table in some:
            ids, wrong = check_ids(table.name, ids_of[table])
            checked.append(ids)
            error = error or wrong
        way = swap.pull("lookup", [t.weight.shard for t in some], checked, some[0].weight.group, error)
        for table, wanted, rows in zip(some, way.wanted, way.wait(), strict=True):
            given = ids_of[table]
            rows = rows.to(given.device) if isinstance(given, Tensor) else rows
            if torch.is_grad_enabled():
                rows = _Noted.apply(torch.empty(0, requires_grad=True), [rows], wanted, table)
            found[table] = rows
    return found


class _Noted(torch.autograd.Function):
    """Rows that came from a table; their gradient is noted there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: list[Tensor], wanted: Wanted, table: DistEmbedding) -> Tensor:
        ctx.wanted, ctx.table = wanted, table
        return rows.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        if ctx.table.learns:
            ctx.table.noted.append((ctx.wanted, grad.detach()))
        return None, None, None, None
