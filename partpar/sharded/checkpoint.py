r"""Shards in the form that :mod:`torch.distributed.checkpoint` saves and loads, onto any number of workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar.directory import from_raw_ids
from partpar.errors import RouteError
from partpar.route import Route
from partpar.sharded.shard import Shard

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


class ShardedRows(Tensor):
    r"""Stands in a ``state_dict`` for the rows of all workers; :attr:`local` are those of this one.

    It has the shape of the whole and knows how to be saved, loaded, detached and cloned, and nothing else.
    """

    local: Tensor
    first_id: int

    @staticmethod
    def __new__(cls: type[ShardedRows], shape: torch.Size, local: Tensor, first_id: int) -> ShardedRows:
        self: ShardedRows = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype)
        self.local, self.first_id = local, first_id
        return self

    @classmethod
    def of(cls, shard: Shard, rows: Tensor | None = None) -> ShardedRows:
        r"""The rows of a shard, or others that are laid out like them; not a copy."""
        local = shard.rows if rows is None else rows
        return cls(torch.Size((shard.policy.num_rows, *local.shape[1:])), local, shard.first_id)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket
        if name is torch.ops.aten.detach:
            return cls(args[0].shape, args[0].local, args[0].first_id)
        if name is torch.ops.aten.clone:
            return cls(args[0].shape, args[0].local.clone(), args[0].first_id)
        raise RouteError(f"expected rows of all workers to be saved or loaded, found {func}; use .local")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedRows({tuple(self.shape)}, {len(self.local)} here from {self.first_id})"

    # --- what torch.distributed.checkpoint asks of a tensor (importing it takes memory that training can do without) --

    def _chunk(self) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        offsets = torch.Size((self.first_id, *[0] * (self.local.dim() - 1)))
        return ChunkStorageMetadata(offsets=offsets, sizes=self.local.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if not len(self.local) and self.shape[0]:  # an empty block would be told from the next one by nothing
            return []
        chunk = self._chunk()
        data = TensorWriteData(
            chunk=chunk, properties=TensorProperties.create_from_tensor(self.local), size=self.shape
        )
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if len(self.local) else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local


def meaning_of(shard: Shard) -> dict[str, Tensor]:
    r"""What a state says of the meaning of ids; see :class:`~partpar.sharded.PartPolicy`."""
    policy = shard.policy
    told = {"numbering": torch.tensor(policy.numbering)}
    if policy.raw_ids is not None:  # a copy, for those of a checkpoint will be read into it
        told["raw_ids"] = ShardedRows.of(shard, policy.raw_ids.clone())
    return told


def way_from(state: Mapping[str, Any], shard: Shard, group: ProcessGroup | None) -> Route | None:
    r"""The way that rows of a state take to a shard's (collective where the ids of the two differ).

    Args:
        state: With what :func:`meaning_of` tells, unless it does not say.
        shard: Which is to take the rows.
        group: Of the shard's ranks.

    Returns:
        A route from the rows of the state to those of the shard; :obj:`None` where ids mean the same.

    Raises:
        RouteError: It is not known which row is whose.
    """
    found, expected = state.get("numbering"), shard.policy.numbering
    if not isinstance(found, Tensor) or int(found) == expected:
        return None
    theirs, ours = state.get("raw_ids"), shard.policy.raw_ids
    if ours is None or not isinstance(theirs, ShardedRows):
        of = [f"partition {n:015x}" if n else "no partition" for n in (expected, int(found))]
        raise RouteError(
            f"{shard.name}: expected rows by the ids of {of[0]}, found rows by those of {of[1]}, where a row is another "
            "node's; give the same kind of part_policy as when they were saved"
        )
    return Route(ours, **vars(from_raw_ids(ours, theirs.local, group)), group=group)


def copy_rows(found: Any, shard: Shard, into: Tensor | None = None, way: Route | None = None) -> None:
    r"""Takes rows from a state over into a shard's, or into others that are laid out like them.

    Args:
        found: The rows of the state.
        shard: Which takes them.
        into: Others, such as an optimiser keeps for each row.
        way: Of :func:`way_from` (collective if there is one).

    Raises:
        RouteError: They are not a shard's of this layout, nor all rows.
    """
    into = shard.rows if into is None else into
    shape = (shard.policy.num_rows, *into.shape[1:])
    if not isinstance(found, Tensor) or tuple(found.shape) != shape or found.dtype != into.dtype:
        told = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise RouteError(f"{shard.name}: expected {into.dtype} of shape {shape}, found {told}")
    if isinstance(found, ShardedRows):
        if found.first_id != shard.first_id or found.local.shape != into.shape:
            last = found.first_id + len(found.local) - 1
            raise RouteError(
                f"{shard.name}: expected the rows {shard.first_id} to {shard.first_id + len(into) - 1} of this worker, "
                f"found {found.first_id} to {last}; for another split, go through torch.distributed.checkpoint"
            )
        rows = found.local
    else:
        rows = found[shard.first_id : shard.first_id + len(into)]
    if way is not None:
        into.copy_(way.apply(rows))
    elif rows.data_ptr() != into.data_ptr():
        into.copy_(rows)
