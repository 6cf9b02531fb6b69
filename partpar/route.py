r"""The route: an immutable plan of which owned rows go to which peer and which halo rows come back.

After the manner of PETSc's star forests (Zhang et al., "The PetscSF scalable communication layer", TPDS 2022): a plan
holds index tables, the caller owns the data, and every operation and its transpose come from the same tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import directory, exchange
from partpar.errors import RouteError
from partpar.policy import Policy
from partpar.transfer import Apply, Blocks, Max, ReduceSum, RouteInFlight

REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(frozen=True, eq=False)
class Route:
    r"""Moves rows between the workers that own them and those that need them as halo.

    The sources of a share are its owned nodes, then its halo grouped by owner, so that own rows never travel and a
    received block *is* the halo slice. Build one by ``share.to_route()`` or :meth:`from_raw_ids`; all calls but
    :meth:`bytes_per_peer` and :meth:`to` are collective over :attr:`group`.

    Args:
        raw_ids: ``[num_src]`` int64, the raw id of every source row.
        num_owned: Rows owned here.
        num_halo: Rows received from peers.
        send_index: ``[sum(send_splits)]`` int64, the owned rows to send, grouped by peer.
        send_splits: Rows sent to each rank.
        recv_splits: Rows received from each rank.
        order: ``[num_src]`` int64, the place of each source row in "owned, then halo", or :obj:`None` where source
            rows stand in just that order (as in every share).
        group: The route's own process group; :obj:`None` when alone.
        policy: What may happen to rows on their way; see :meth:`with_policy`.
    """

    raw_ids: Tensor
    num_owned: int
    num_halo: int
    send_index: Tensor
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]
    order: Tensor | None = None
    group: ProcessGroup | None = None
    policy: Policy = field(default_factory=Policy)
    _checks: exchange.Checks = field(default_factory=exchange.Checks, repr=False)

    # --- building -----------------------------------------------------------------------------------------------

    @classmethod
    def trivial(cls, num_nodes: int, raw_ids: Tensor | None = None) -> Route:
        r"""The route of one process that owns everything."""
        raw_ids = torch.arange(num_nodes) if raw_ids is None else raw_ids
        return cls(raw_ids, num_nodes, 0, torch.empty(0, dtype=torch.int64), (0,), (0,))

    @classmethod
    def from_raw_ids(cls, src_ids: Tensor, dst_ids: Tensor, group: ProcessGroup | None = None) -> Route:
        r"""Builds a route for arbitrary ids (collective). Owners are found through a directory spread over all ranks,
        so that memory stays proportional to the ids given.

        Args:
            src_ids: ``[num_src]`` int64, the ids whose rows are wanted here, in any order, repeated or not.
            dst_ids: ``[num_owned]`` int64, the ids whose rows this rank owns.
            group: The process group; :obj:`None` means the default one.

        Returns:
            A route whose :meth:`apply` returns row ``i`` for ``src_ids[i]``.

        Raises:
            RouteError: An id is owned by nobody or twice, or ids are not 1-dimensional int64; on every rank.
        """
        own = exchange.own_group(group)
        tables = directory.from_raw_ids(src_ids, dst_ids, own)
        return cls(src_ids, **vars(tables), group=own)

    @classmethod
    def from_offsets(
        cls,
        raw_ids: Tensor,
        halo_ids: Tensor,
        offsets: Tensor,
        group: ProcessGroup | None = None,
        part_id: int | None = None,
        **agreed: int,
    ) -> Route:
        r"""Builds the route of a share whose owners are known by ranges of ids (collective, one exchange of ids).

        Args:
            raw_ids: ``[num_owned + num_halo]`` int64.
            halo_ids: ``[num_halo]`` int64, ascending.
            offsets: ``[num_parts + 1]`` int64, part p owns ids ``offsets[p]`` to ``offsets[p + 1] - 1``.
            group: The process group, one rank for each part; :obj:`None` means the default one.
            part_id: Whose halo this is, to be refused on any other rank than its own.
            agreed: Numbers that all ranks must have alike, such as a digest of the partition's run id.
        """
        own = exchange.own_group(group)
        tables = directory.from_offsets(halo_ids, offsets, own, agreed, part_id)
        return cls(raw_ids, **vars(tables), group=own)

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def num_src(self) -> int:
        r"""Rows that :meth:`apply` returns."""
        return self.raw_ids.size(0)

    @property
    def rank(self) -> int:
        return exchange.rank_and_size(self.group)[0]

    @property
    def world_size(self) -> int:
        return exchange.rank_and_size(self.group)[1]

    def bytes_per_peer(self, width: int, dtype: torch.dtype = torch.float32) -> list[int]:
        r"""Bytes that one :meth:`apply` of rows of :obj:`width` elements sends to each rank (to this one: 0).
        :meth:`reduce` moves the same blocks the other way."""
        size = exchange.bytes_on_wire(dtype, self.policy.wire_dtype)
        return [n * width * size for n in self.send_splits]

    @property
    def blocks(self) -> Blocks:
        r"""The blocks that one exchange moves, under the policy where gradients are on and exactly where they are off."""
        wire_dtype = self.policy.wire_dtype if torch.is_grad_enabled() else None
        return Blocks(self.send_splits, self.recv_splits, self.group, wire_dtype)

    def with_policy(self, wire_dtype: torch.dtype | None = None) -> Route:
        r"""The same plan under another policy.

        Args:
            wire_dtype: See :class:`partpar.policy.Policy`.
        """
        return replace(self, policy=Policy(wire_dtype), _checks=exchange.Checks())

    def to(self, device: torch.device | str) -> Route:
        r"""The same plan with its tables on :obj:`device`."""
        order = None if self.order is None else self.order.to(device)
        return replace(
            self, raw_ids=self.raw_ids.to(device), send_index=self.send_index.to(device), order=order
        )

    def __repr__(self) -> str:
        halo = f"{self.num_owned} owned, {self.num_halo} halo, {sum(self.send_splits)} sent"
        return f"Route(rank {self.rank} of {self.world_size}: {halo})"

    # --- moving rows --------------------------------------------------------------------------------------------

    def apply(self, x: Tensor) -> Tensor:
        r"""Copies owner to halo. Its gradient is the transpose: halo gradients are summed at the owner.

        Args:
            x: ``[num_owned, *]``, any floating dtype; integers and booleans travel without gradient.

        Returns:
            ``[num_src, *]``: the owned rows, then the halo.

        Raises:
            RouteError: Rows, dtype, trailing shape or ``requires_grad`` do not fit; on every rank.
        """
        self.check("apply", x)
        out: Tensor = Apply.apply(x, self, self.blocks)
        return out if self.order is None else out.index_select(0, self.order)

    def apply_begin(self, x: Tensor) -> RouteInFlight:
        r"""Begins an :meth:`apply`: interior work may be done before :meth:`RouteInFlight.wait`. In the backward pass
        likewise, the halo's gradient leaves before the interior's is computed. Several may be in flight."""
        self.check("apply_begin", x)
        return RouteInFlight(x, self)

    def reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        r"""Combines every owned row with its copies in the halos of all peers; differentiable.

        Args:
            x: ``[num_src, *]``.
            op: ``"sum"`` (the transpose of :meth:`apply`), ``"mean"``, ``"max"`` or ``"min"``. The gradient of a tie
                is split evenly over all tied entries on all ranks.

        Returns:
            ``[num_owned, *]``; a row without any copy is 0.
        """
        wrong = (
            None
            if op in REDUCTIONS
            else f"reduce: expected op to be one of {', '.join(REDUCTIONS)}; found {op!r}"
        )
        self.check(f"reduce({op})", x, self.num_src, wrong)
        if op == "sum":
            return self.sum_copies(x)
        ones = x.new_ones((self.num_src, *[1] * (x.dim() - 1)), requires_grad=False)
        count = self.sum_copies(ones).clamp_(min=1)
        if op == "mean":
            return self.sum_copies(x) / count
        if op == "max":
            return Max.apply(x, self)
        return -Max.apply(-x, self)

    def restrict(self, mask: Tensor) -> Route:
        r"""The sub-route that only moves the wanted rows (collective).

        Args:
            mask: ``[num_src]`` bool, the source rows that are wanted here.

        Returns:
            A route over the same owned rows whose :meth:`apply` returns ``mask.sum()`` rows; it equals one built from
            ``raw_ids[mask]``.
        """
        wrong = None
        if mask.dtype != torch.bool or tuple(mask.shape) != (self.num_src,):
            wrong = f"restrict: expected a bool mask of shape ({self.num_src},), found {mask.dtype} of shape {tuple(mask.shape)}"
        exchange.agree(self.group, "restrict", {}, wrong)
        order = (torch.arange(self.num_src, device=mask.device) if self.order is None else self.order)[mask]
        wanted = torch.zeros(self.num_owned + self.num_halo, dtype=torch.bool, device=mask.device)
        wanted[order] = True
        kept = wanted[self.num_owned :]
        asked = exchange.send_rows(kept, self.recv_splits, self.send_splits, self.group).wait()

        place = wanted.clone()
        place[: self.num_owned] = True  # owned rows keep their places whether wanted or not
        order = (place.cumsum(0) - 1)[order]
        num_halo = int(kept.sum())
        straight = torch.equal(order, torch.arange(self.num_owned + num_halo, device=order.device))
        return replace(
            self,
            raw_ids=self.raw_ids[mask],
            num_halo=num_halo,
            send_index=self.send_index[asked],
            send_splits=tuple(int(b.sum()) for b in asked.split(list(self.send_splits))),
            recv_splits=tuple(int(b.sum()) for b in kept.split(list(self.recv_splits))),
            order=None if straight else order,
            _checks=exchange.Checks(),
        )

    # --- for those who move rows by this plan -------------------------------------------------------------------

    def check(self, what: str, x: Tensor, num_rows: int | None = None, wrong: str | None = None) -> None:
        r"""Refuses bad rows on every rank before any rank sends.

        Args:
            what: The call's name, for messages.
            x: The rows.
            num_rows: How many are expected; by default one for each owned node.
            wrong: What this rank found wrong already.
        """
        num_rows = self.num_owned if num_rows is None else num_rows
        if wrong is None and not isinstance(x, Tensor):
            wrong = f"{what}: expected a tensor of {num_rows} rows, found {type(x).__name__}"
        if wrong is None and (x.dim() == 0 or x.size(0) != num_rows):
            rows = "owned" if num_rows == self.num_owned else "source"
            wrong = f"{what}: expected {num_rows} rows (one for each {rows} node), found a tensor of shape {tuple(x.shape)}"
        if wrong is None and x.device.type != self.send_index.device.type:
            wrong = f"{what}: expected rows on {self.send_index.device} as the route is, found {x.device}; use route.to({str(x.device)!r})"
        if wrong is None and x.dim() > 9:
            wrong = f"{what}: expected at most 8 trailing dimensions, found shape {tuple(x.shape)}"
        kind = (what, x.dtype, x.shape[1:], x.requires_grad, self.policy.wire_dtype) if wrong is None else ()
        if self._checks.due(*kind):
            fields = (
                {} if wrong is not None else {"wire dtype": self.policy.code, **exchange.tensor_fields(x)}
            )
            exchange.agree(self.group, what, fields, wrong)
        elif wrong is not None:
            raise RouteError(wrong)

    def refuse(self, wrong: str) -> None:
        r"""Raises what this rank found wrong with its own input; on every rank, as long as calls are checked.

        Raises:
            RouteError: With :obj:`wrong`.
        """
        if self._checks.due():
            exchange.agree(self.group, "refuse", {}, wrong)
        raise RouteError(wrong)

    def sum_copies(self, x: Tensor) -> Tensor:
        r"""``reduce(x, "sum")`` without its checks."""
        if self.order is not None:
            x = x.new_zeros((self.num_owned + self.num_halo, *x.shape[1:])).index_add(0, self.order, x)
        return ReduceSum.apply(x, self, self.blocks)
