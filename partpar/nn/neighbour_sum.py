r"""Sums over in-neighbours that are spread over workers: as few bytes as possible, hidden behind the interior.

With the share's edges split by where their source is owned, the sum over all in-edges is

.. math::
    A x = A_{own} \, x + A_{halo} \, P \, (S x),

where :math:`P` carries blocks of rows between ranks. For a peer that gets plain rows, :math:`S` picks them and
:math:`A_{halo}` holds the edges. Where a peer has fewer destinations than there are rows for it, its edges move to the
sender: :math:`S` sums them and :math:`A_{halo}` puts each partial sum in place. Both are the same sparse products, so
that gradients follow by transposition. The exchange begins first, the interior is summed meanwhile, and boundary rows
are added at last; likewise backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from partpar import exchange
from partpar.errors import RouteError
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.aggregate import aggregate_sum
from partpar.route import Route
from partpar.transfer import Blocks, BlocksInFlight

PIECE = 2048  # rows: enough for kernels to be at their best, few enough to stay near the cores
RowsOf = Callable[[int, int], Tensor]


def pieces(num_rows: int) -> Iterator[tuple[int, int]]:
    r"""Cuts rows into ranges ``(first, last)`` of at most :data:`PIECE`; one, empty, if there are none."""
    for first in range(0, max(num_rows, 1), PIECE):
        yield first, min(first + PIECE, num_rows)


@dataclass(frozen=True, eq=False)
class Edges:
    r"""Edges and, if they have some, a constant weight each (``[E]``, in the adjacency's order)."""

    adj: Adjacency
    weight: Tensor | None = None

    def sum(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        r"""Sums source rows over in-edges, on top of :obj:`out` (in place) if one is given."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return aggregate_sum(self.adj, x, weight, out)

    @cached_property
    def transposed(self) -> Edges:
        r"""The same edges from destinations to sources."""
        weight = None if self.weight is None else self.weight.index_select(0, self.adj.transpose_order)
        return Edges(self.adj.transposed, weight)

    def rows(self, first: int, last: int) -> Edges:
        r"""The edges into destinations ``first`` to ``last - 1`` alone."""
        begin, end = self.adj.indptr[[first, last]].tolist()
        return Edges(self.adj.rows(first, last), None if self.weight is None else self.weight[begin:end])

    def fetch(self, x: Tensor) -> Tensor:
        r"""No slots: all sources are at hand."""
        return x.new_empty((0, *x.shape[1:]))

    def begin(self, x: Tensor, received: Tensor | None = None) -> RowsOf:
        r"""What gives the sum for a range of destinations, without gradient."""
        return lambda first, last: self.rows(first, last).sum(x)

    def add_transposed(self, grad: Tensor, out: Tensor) -> None:
        r"""Adds to :obj:`out` what its gradient is if that of the sum is :obj:`grad`."""
        for first, last in pieces(out.size(0)):
            out[first:last] += self.transposed.rows(first, last).sum(grad)


@dataclass(frozen=True, eq=False)
class NeighbourSum:
    r"""The plan of one sum over in-neighbours; make it by :func:`plan_sum`.

    Args:
        own: Edges from owned sources.
        send: Edges from owned rows into the slots to be sent, or :obj:`None` where slots are just the route's rows.
        halo: Edges from received slots.
        blocks: Slots to and from each rank.
        route: The share's route.
    """

    own: Edges
    send: Edges | None
    halo: Edges
    blocks: Blocks
    route: Route

    def __call__(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        r"""Sums the rows of in-neighbours (collective).

        Args:
            x: ``[num_owned, C]``, the rows of the owned nodes.
            base: ``[num_owned, C]``, changed in place: rows to add to.

        Returns:
            ``[num_owned, C]``.
        """
        self.route.check("sum over in-neighbours", x)
        flight = BlocksInFlight(self._slots(x), self._wire)
        out = self.own.sum(x, base)
        return self.halo.sum(flight.wait(), out)

    def fetch(self, x: Tensor) -> Tensor:
        r"""The slots that other workers send (collective), without gradient."""
        self.route.check("sum over in-neighbours", x)
        return self._wire.begin(self._slots(x)).wait()

    def begin(self, x: Tensor, received: Tensor) -> RowsOf:
        r"""What gives the sum for a range of owned rows from all of them and the slots received, without gradient."""
        own = self.own.begin(x)
        return lambda first, last: self.halo.rows(first, last).sum(received, own(first, last))

    def add_transposed(self, grad: Tensor, out: Tensor) -> None:
        r"""Adds to :obj:`out`, ``[num_owned, C]``, what its gradient is if that of the sum is :obj:`grad` (collective)."""
        flight = self._wire.back().begin(self.halo.transposed.sum(grad))
        self.own.add_transposed(grad, out)
        if self.send is None:
            out.index_add_(0, self.route.send_index, flight.wait())
        else:
            self.send.transposed.sum(flight.wait(), out)

    def _slots(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.route.send_index) if self.send is None else self.send.sum(x)

    @property
    def _wire(self) -> Blocks:
        return replace(self.blocks, wire_dtype=self.route.blocks.wire_dtype)

    def bytes_per_peer(self, width: int, dtype: torch.dtype = torch.float32) -> list[int]:
        r"""Bytes that one sum of rows of :obj:`width` elements sends to each rank."""
        size = exchange.bytes_on_wire(dtype, self.route.policy.wire_dtype)
        return [n * width * size for n in self.blocks.send_splits]


def plan_sum(
    adj: Adjacency, route: Route, weight: Tensor | None = None, partial: bool = True
) -> NeighbourSum:
    r"""Plans sums over the in-edges of a share (collective).

    Args:
        adj: The share's edges: sources are owned nodes, then the halo.
        route: The share's route.
        weight: ``[E]``, a constant for each edge.
        partial: Send partial sums to peers for which they are fewer than rows.

    Raises:
        RouteError: The adjacency is not that of the route's share; on every rank.
    """
    wrong = None
    if adj.num_dst != route.num_owned or adj.num_src != route.num_src or route.order is not None:
        wrong = (
            f"expected the adjacency of the route's share, {route.num_src} sources (owned, then halo) and {route.num_owned} "
            f"destinations; found {adj.num_src} and {adj.num_dst}"
        )
    weighted = int(weight is not None)
    exchange.agree(route.group, "plan_sum", {"weighted": weighted, "partial sums": int(partial)}, wrong)

    split = adj.split(route.num_owned)
    own = Edges(split.owned, None if weight is None else weight[split.owned_edges])
    halo = Edges(split.halo, None if weight is None else weight[split.halo_edges])
    if route.group is None or not partial:
        return NeighbourSum(own, None, halo, route.blocks, route)
    return _with_partial_sums(own, halo, route)


def _with_partial_sums(own: Edges, halo: Edges, route: Route) -> NeighbourSum:
    """Moves edges to the sender wherever that saves rows."""
    world_size, device = route.world_size, halo.adj.device
    rows = torch.tensor(route.recv_splits, device=device)
    starts = rows.cumsum(0) - rows
    source, target = halo.adj.indices.to(torch.int64), halo.adj.destinations.to(torch.int64)
    peer = torch.searchsorted(starts + rows, source, right=True)

    # One slot for each destination that a peer's rows reach, by peer and then by destination.
    pair, slot_of_edge = (peer * max(route.num_owned, 1) + target).unique(return_inverse=True)
    sums = torch.bincount(pair // max(route.num_owned, 1), minlength=world_size)
    fewer = sums < rows
    recv_splits = torch.where(fewer, sums, rows)
    slot_starts = recv_splits.cumsum(0) - recv_splits

    # What each peer is told: how many of its edges move to it, and for each the row in its block and the slot.
    moves = fewer[peer]
    by_peer = peer[moves].argsort(stable=True)
    slot = slot_of_edge[moves] - (sums.cumsum(0) - sums)[peer[moves]]
    order = torch.stack([source[moves] - starts[peer[moves]], slot], 1)[by_peer]
    moved = torch.bincount(peer[moves], minlength=world_size).tolist()
    orders, order_splits = exchange.swap_rows(order, moved, route.group)
    weights = None
    if halo.weight is not None:
        weights = exchange.send_rows(halo.weight[moves][by_peer], moved, order_splits, route.group).wait()
    said = torch.stack([fewer.to(torch.int64), sums], 1)
    heard, _ = exchange.swap_rows(said, [1] * world_size, route.group)

    # Edges that stay, and one edge from each partial sum.
    stays = ~moves
    kept_source = source[stays] - starts[peer[stays]] + slot_starts[peer[stays]]
    of_slot = pair // max(route.num_owned, 1)
    is_sum = fewer[of_slot]
    sum_source = (
        torch.arange(pair.numel(), device=device) - (sums.cumsum(0) - sums)[of_slot] + slot_starts[of_slot]
    )[is_sum]
    sum_target = (pair % max(route.num_owned, 1))[is_sum]
    edge_index = torch.stack([torch.cat([kept_source, sum_source]), torch.cat([target[stays], sum_target])])
    merged = Adjacency.from_edge_index(edge_index, int(recv_splits.sum()), route.num_owned)
    halo_weight = None
    if halo.weight is not None:
        halo_weight = torch.cat([halo.weight[stays], halo.weight.new_ones(int(is_sum.sum()))])[
            merged.edge_ids
        ]

    send, send_splits = _sender(route, orders, order_splits, weights, heard)
    blocks = Blocks(send_splits, tuple(recv_splits.tolist()), route.group)
    return NeighbourSum(own, send, Edges(merged, halo_weight), blocks, route)


def _sender(
    route: Route, orders: Tensor, order_splits: list[int], weights: Tensor | None, heard: Tensor
) -> tuple[Edges | None, tuple[int, ...]]:
    """What this rank sends to each peer: the route's rows, or sums of them as the peer ordered."""
    send_splits, sources, targets, values = [], [], [], []
    if not bool(heard[:, 0].any()):
        return None, route.send_splits
    first = 0
    blocks = route.send_index.split(list(route.send_splits))
    orders_of = orders.split(order_splits)
    weights_of = [None] * len(blocks) if weights is None else weights.split(order_splits)
    for rank, (block, order, weight) in enumerate(zip(blocks, orders_of, weights_of, strict=True)):
        is_sum, num_sums = heard[rank].tolist()
        if is_sum:
            if order.numel() and not (
                int(order.min()) >= 0
                and int(order[:, 0].max()) < block.numel()
                and int(order[:, 1].max()) < num_sums
            ):
                raise RouteError(f"plan_sum: rank {rank} asked for sums of rows that it has no route for")
            sources.append(block[order[:, 0]])
            targets.append(order[:, 1] + first)
            num_slots = num_sums
        else:
            num_slots = block.numel()
            sources.append(block)
            targets.append(torch.arange(num_slots, device=block.device) + first)
        if weight is not None:
            values.append(weight if is_sum else weight.new_ones(num_slots))
        send_splits.append(num_slots)
        first += num_slots
    adj = Adjacency.from_edge_index(
        torch.stack([torch.cat(sources), torch.cat(targets)]), route.num_owned, first
    )
    value = None if weights is None else torch.cat(values)[adj.edge_ids]
    return Edges(adj, value), tuple(send_splits)
