r"""A tensor with a row for each node, or for each of anything, that no worker holds whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.agreement import digest
from partpar.errors import RouteError
from partpar.graph import GraphData
from partpar.kernels.whole_rows import put_rows
from partpar.sharded import swap
from partpar.sharded.checkpoint import ShardedRows, copy_rows, meaning_of, way_from
from partpar.sharded.initializers import InitFunc, initialise
from partpar.sharded.policy import PartPolicy, as_policy
from partpar.sharded.shard import Shard, names

if TYPE_CHECKING:
    from partpar.sharded.one_sided import OneSided

_MOST_DIMENSIONS = 8
_ID_DTYPES = (torch.int64, torch.int32)


class DistTensor:
    r"""Rows that live with their owners, found by id from everywhere; arguments as in DGL's ``dgl.distributed``.

    .. code-block:: python

        t = DistTensor((num_nodes, 16), torch.float32, "h", part_policy=share)
        t.local_rows[:] = x  # the rows of the owned nodes
        rows = t[ids]  # anybody's rows
        t[ids] = rows

    Making one, ``t[ids]`` and ``t[ids] = rows`` are collective: every rank calls them, with ids of its own, which may
    be empty. :meth:`one_sided` gives the same rows to any rank at any time. Rows stay in host memory.

    Args:
        shape: Rows first.
        dtype: Of the entries.
        name: By which ranks agree what they speak of; tensors without one are numbered in the order of their making. A
            second tensor of a name and shape that are there already is the same rows.
        init_func: First values, see :mod:`partpar.sharded.initializers`; :obj:`None` means zeros.
        part_policy: A share (rows live with its nodes), offsets ``[num_parts + 1]``, or a policy of
            :func:`~partpar.sharded.node_policy` or :func:`~partpar.sharded.edge_policy`. :obj:`None` splits evenly.
        persistent: Keep the rows under their name, even if nobody uses them.
        group: The process group; by default all processes.

    Raises:
        RouteError: Arguments do not fit each other or the tensor of that name; on every rank.
        AgreementError: Ranks disagree on an argument; on every rank.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
        init_func: InitFunc | None = None,
        part_policy: PartPolicy | Tensor | Sequence[int] | GraphData | None = None,
        persistent: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        self.group = exchange.own_group(group)
        rank, size = exchange.rank_and_size(self.group)
        known = names(self.group)
        name = known.next_name() if name is None else name
        policy, wrong = None, None
        try:
            shape = torch.Size(shape)
            if not 1 <= len(shape) <= _MOST_DIMENSIONS or shape[1:].numel() == 0:
                raise RouteError(
                    f"expected a number of rows and up to {_MOST_DIMENSIONS - 1} further sizes above 0, found {tuple(shape)}"
                )
            policy = as_policy(part_policy, shape[0], size)
        except (RouteError, TypeError) as error:
            wrong = f"DistTensor {name!r}: {error}"
        shard = known.get(name)
        if policy is not None and shard is not None:
            there, asked = (tuple(shard.shape), shard.rows.dtype), (tuple(shape), dtype)
            if there != asked or shard.policy != policy:
                wrong = (
                    f"DistTensor {name!r}: expected {there[0]} of {there[1]}, split at {shard.policy.offsets}, as the "
                    f"tensor of that name is, found {asked[0]} of {asked[1]}, split at {policy.offsets}; choose another name"
                )
        fields = {} if policy is None else {
            "number of dimensions": len(shape), **{f"size of dimension {i}": n for i, n in enumerate(shape)},
            "dtype": exchange.tensor_fields(torch.empty(0, dtype=dtype))["dtype"],
            "part_policy": digest(policy.offsets), "whether the name is taken": int(shard is not None),
        }  # fmt: skip
        exchange.agree(self.group, f"DistTensor {name!r}", fields, wrong)
        assert policy is not None
        fresh = shard is None
        if shard is None:
            num_local = policy.offsets[rank + 1] - policy.offsets[rank]
            shard = Shard(name, torch.empty((num_local, *shape[1:]), dtype=dtype), policy, rank)
        self.shard = shard
        if fresh:
            try:
                initialise(shard.rows, shard.first_id, init_func, digest(name, rank))
                wrong = None
            except RouteError as error:
                wrong = f"DistTensor {name!r}: {error}"
            exchange.agree(self.group, f"DistTensor {name!r}", {}, wrong)
        known.put(shard, persistent)

    @classmethod
    def attach(cls, name: str, group: ProcessGroup | None = None) -> DistTensor:
        r"""The tensor of a name that is there already (collective).

        Raises:
            RouteError: There is none on some rank; on every rank.
        """
        self = cls.__new__(cls)
        self.group = exchange.own_group(group)
        shard = names(self.group).get(name)
        wrong = None
        if shard is None:
            there = ", ".join(map(repr, names(self.group).all())) or "none"
            wrong = f"DistTensor: expected the name of a tensor that is there ({there}), found {name!r}"
        exchange.agree(self.group, f"DistTensor.attach({name!r})", {}, wrong)
        assert shard is not None
        self.shard = shard
        return self

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def shape(self) -> torch.Size:
        r"""Of the whole tensor."""
        return self.shard.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.shard.rows.dtype

    @property
    def part_policy(self) -> PartPolicy:
        return self.shard.policy

    @property
    def local_rows(self) -> Tensor:
        r"""``[num_local, *]``, this worker's rows themselves, to be read and written in place."""
        return self.shard.rows

    @property
    def local_ids(self) -> Tensor:
        r"""``[num_local]`` int64, the ids of :attr:`local_rows`."""
        return torch.arange(self.shard.first_id, self.shard.first_id + len(self.shard.rows))

    def __len__(self) -> int:
        return self.shard.policy.num_rows

    def __repr__(self) -> str:
        return f"DistTensor({self.name!r}, {tuple(self.shape)}, {self.dtype}, {len(self.local_rows)} rows here)"

    # --- moving rows --------------------------------------------------------------------------------------------

    def gather_begin(self, ids: Tensor) -> RowsInFlight:
        r"""Begins fetching rows (collective); work may be done before :meth:`RowsInFlight.wait`. Several may be under
        way."""
        checked, error = check_ids(self.name, ids)
        return RowsInFlight(swap.pull("gather", [self.shard], [checked], self.group, error))

    def __getitem__(self, ids: Tensor) -> Tensor:
        r"""The rows of ids (collective).

        Args:
            ids: ``[n]`` int64 or int32, in any order, repeated or none; other for each rank.

        Raises:
            IdError: An id is out of range; on its rank. Others raise a :class:`RouteError` that names that rank.
        """
        return self.gather_begin(ids).wait()

    def __setitem__(self, ids: Tensor, rows: Tensor | float) -> None:
        r"""Replaces rows (collective). Of several rows for one id, the last one of the highest rank stays.

        Args:
            ids: As for :meth:`__getitem__`.
            rows: ``[n, *]`` of the tensor's dtype, or one number for all entries.

        Raises:
            RouteError: Shape or dtype do not fit; on every rank.
        """
        checked, error = check_ids(self.name, ids)
        values = self.shard.rows.new_empty((0, *self.shape[1:]))
        if error is None:
            values, error = check_rows(self.shard, checked, rows)
        wanted, error = swap.find([self.shard], [checked], error)
        arrived = swap.push("scatter", [self.shard], wanted, [values], self.group, error)
        for brought in arrived.wait().of(0):
            wrong = put_rows(self.shard.whole, brought.rows, brought.values, brought.at)
            assert wrong < 0, "a rank named a row that is not here"
        arrived.done()

    def one_sided(self, transport: Any) -> OneSided:
        r"""The same tensor, whose rows any rank fetches and puts at any time, without the others' calling; see
        :class:`~partpar.sharded.one_sided.OneSided`."""
        from partpar.sharded.one_sided import OneSided

        return OneSided(self, transport)

    # --- keeping ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        r"""``{"rows": ..., "numbering": ...}``, this worker's rows as :mod:`torch.distributed.checkpoint` saves them and
        fills them in, onto any number of workers, and what ids mean: which partition's they are, and with it
        ``"raw_ids"``."""
        return {"rows": ShardedRows.of(self.shard), **meaning_of(self.shard)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        r"""Takes rows over (collective where they were saved by the ids of another partition).

        Args:
            state: Of :meth:`state_dict`; or ``{"rows": whole}`` with all rows as one tensor.

        Raises:
            RouteError: Keys, shape or dtype do not fit, or it is not known which row is whose.
        """
        if set(state) - {"numbering", "raw_ids"} != {"rows"}:
            raise RouteError(f"{self.name}: expected a state with the key 'rows', found {sorted(state)}")
        copy_rows(state["rows"], self.shard, way=way_from(state, self.shard, self.group))


class RowsInFlight:
    r"""A gather that has begun."""

    def __init__(self, way: swap.RowsOnTheWay) -> None:
        self._way = way

    def wait(self) -> Tensor:
        r"""Awaits and returns ``[n, *]``, a tensor of the caller's own."""
        return self._way.wait()[0]


def check_ids(name: str, ids: Any) -> tuple[Tensor, RouteError | None]:
    r"""Ids as ``[n]`` in host memory, or what is wrong with them."""
    if not isinstance(ids, Tensor):
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            return torch.empty(0, dtype=torch.int64), RouteError(
                f"{name}: expected a tensor of ids, found {type(ids).__name__}"
            )
    if ids.numel() == 0 and ids.dim() == 1:
        return torch.empty(0, dtype=torch.int64), None
    if ids.dim() != 1 or ids.dtype not in _ID_DTYPES:
        found = f"{ids.dtype} of shape {tuple(ids.shape)}"
        return torch.empty(0, dtype=torch.int64), RouteError(
            f"{name}: expected a 1-dimensional tensor of int64 or int32 ids, found {found}"
        )
    return ids.detach().cpu().contiguous(), None


def check_rows(shard: Shard, ids: Tensor, rows: Any) -> tuple[Tensor, RouteError | None]:
    r"""Rows for ids as they travel, or what is wrong with them."""
    shape, dtype = (len(ids), *shard.rows.shape[1:]), shard.rows.dtype
    if isinstance(rows, (int, float, bool)):
        return torch.full(shape, rows, dtype=dtype), None
    nothing = torch.empty((0, *shape[1:]), dtype=dtype)
    if not isinstance(rows, Tensor) or tuple(rows.shape) != shape or rows.dtype != dtype:
        found = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        return nothing, RouteError(f"{shard.name}: expected rows {dtype} of shape {shape}, found {found}")
    return rows.detach().cpu().contiguous(), None


