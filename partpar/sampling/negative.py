r"""Negative links: pairs of nodes, or other ends for given nodes, drawn by counters.

A draw names a raw id, so all parts draw alike; it depends on the batch and on the number of the negative in it. What
may not stand is drawn again, twice as many candidates each time, for all that are left at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch_geometric.sampler import NegativeSampling

from partpar.errors import SamplingError
from partpar.graph import EdgeType
from partpar.kernels import counter
from partpar.kernels.relabel import contains
from partpar.sampling.subgraph import BatchKey, LinkSeeds, Seeds
from partpar.serving.messages import HopRequest

if TYPE_CHECKING:
    from partpar.sampling.neighbor_sampler import NeighborSampler

ROUNDS = 12  # 1 + 2 + 4 + ... candidates: 4095 for each negative
_SRC, _DST = -1, -2  # in the place of a hop, so that these draws are nobody else's


def draw_negatives(
    sampler: NeighborSampler,
    links: LinkSeeds,
    key: BatchKey,
    negatives: NegativeSampling,
    num_neg: int,
    strict: bool,
) -> tuple[Seeds, Seeds]:
    r"""Sources and destinations of negative links.

    Args:
        sampler: Whose graph.
        links: The positive links; negative ``i`` belongs to link ``i % n``, whose time it must not be later than and,
            for triplets, whose source it keeps.
        key: Names the batch.
        negatives: Mode, amount and weights ``[num_nodes]`` by raw id.
        num_neg: How many.
        strict: Draw no link of the batch and no edge of the graph.

    Raises:
        SamplingError: Weights do not fit, or no negative was found although strict.

    Where no candidate is early enough, the earliest stands in, as in PyG.
    """
    src_type, _, dst_type = links.edge_type
    pick = _Picker(sampler, links.edge_type, key, negatives)
    num_pos = links.src.ids.numel()
    link = torch.arange(num_neg) % max(num_pos, 1)
    left = torch.arange(num_neg)
    keeps_src = negatives.is_triplet()
    chosen = [
        links.src.raw_ids.new_empty(num_neg) for _ in range(4)
    ]  # ids and raw ids of sources, of destinations
    if keeps_src:
        chosen[0], chosen[1] = links.src.ids[link], links.src.raw_ids[link]
    best = torch.full((num_neg,), torch.iinfo(torch.int64).max)
    for attempt in range(ROUNDS):
        if not left.numel():
            break
        width = 1 << attempt
        at = left.repeat_interleave(width)
        if keeps_src:
            ends = [chosen[0][at], chosen[1][at], *pick.draw(_DST, left, attempt, width)]
        else:
            ends = [*pick.draw(_SRC, left, attempt, width), *pick.draw(_DST, left, attempt, width)]
        allowed = torch.ones(at.numel(), dtype=torch.bool)
        if strict:
            allowed &= ~_is_positive(sampler, links, ends[0], ends[2])
        late = torch.zeros_like(at)
        if links.times is not None and sampler.time_attr is not None:
            limit = links.times[link[at]]
            sides = [(dst_type, ends[2])] if keeps_src else [(src_type, ends[0]), (dst_type, ends[2])]
            for node_type, ids in sides:
                if sampler.service.has_node_attr(node_type, sampler.time_attr):
                    times = sampler.service.node_rows(node_type, sampler.time_attr, ids).to(torch.int64)
                    late = torch.maximum(late, times - limit)
        # The first candidate that may stand, else the least late of those that are no positives.
        late = torch.where(allowed, late.clamp(min=0), torch.iinfo(torch.int64).max).view(-1, width)
        least, column = late.min(1)
        better = least < best[left]
        place, row = left[better], torch.arange(left.numel())[better]
        for one, candidates in zip(chosen, ends, strict=True):
            one[place] = candidates.view(-1, width)[row, column[better]]
        best[place] = least[better]
        left = left[best[left] > 0]
    if strict and bool((best == torch.iinfo(torch.int64).max).any()):
        i = int((best == torch.iinfo(torch.int64).max).nonzero()[0])
        raise SamplingError(
            f"negative links of type {links.edge_type}: expected one that is no edge, found none among "
            f"{2**ROUNDS - 1} drawn for link {int(link[i])} of the batch; the graph is too dense for strict_negatives"
        )
    return Seeds(chosen[0], chosen[1]), Seeds(chosen[2], chosen[3])


class _Picker:
    r"""Draws raw ids, uniformly or by weights."""

    def __init__(
        self, sampler: NeighborSampler, edge_type: EdgeType, key: BatchKey, negatives: NegativeSampling
    ) -> None:
        self.service = sampler.service
        self.types = {_SRC: edge_type[0], _DST: edge_type[2]}
        self.keys = {
            end: counter.key(counter.key(key.seed, key.epoch, key.batch), end, 0) for end in self.types
        }
        self.upto: dict[int, Tensor | None] = {}
        for end, weight in ((_SRC, negatives.src_weight), (_DST, negatives.dst_weight)):
            size = int(self.service.offsets(self.types[end])[-1])
            if weight is not None and (weight.dim() != 1 or weight.numel() != size):
                raise SamplingError(
                    f"weights of negatives of type {self.types[end]!r}: expected shape [{size}], found {tuple(weight.shape)}"
                )
            upto = None if weight is None else weight.to(torch.float64).cumsum(0)
            if upto is not None and not (bool((weight >= 0).all()) and 0 < float(upto[-1]) < float("inf")):
                raise SamplingError(
                    f"weights of negatives of type {self.types[end]!r}: expected finite numbers of at least 0, some above it"
                )
            self.upto[end] = upto

    def draw(self, end: int, which: Tensor, attempt: int, width: int) -> tuple[Tensor, Tensor]:
        r"""``width`` candidates for each of the negatives: ids and raw ids, those of one behind the other."""
        node_type, upto = self.types[end], self.upto[end]
        num_nodes = int(self.service.offsets(node_type)[-1])
        if which.numel() and not num_nodes:
            raise SamplingError(f"negatives of type {node_type!r}: expected nodes to draw from, found none")
        u = counter.uniform(self.keys[end], attempt, 0, which, width, torch.float64).flatten()
        if upto is None:
            raw_ids = (u * num_nodes).to(torch.int64)
        else:
            raw_ids = torch.searchsorted(upto, u * upto[-1], right=True).clamp_(max=num_nodes - 1)
        return self.service.ids_of(node_type, raw_ids), raw_ids


def _is_positive(sampler: NeighborSampler, links: LinkSeeds, src: Tensor, dst: Tensor) -> Tensor:
    r"""Which pairs of ids are links of the batch, or edges."""
    rows, place = torch.cat([dst, links.dst.ids]).unique(return_inverse=True)
    asked, given = place[: dst.numel()].contiguous(), place[dst.numel() :]
    order = given.argsort(stable=True)
    counts = torch.bincount(given, minlength=rows.numel())
    found = contains(links.src.ids[order].numpy(), counts.numpy(), src.numpy(), asked.numpy())
    if links.edge_type in sampler.edge_types:
        request = HopRequest(links.edge_type, rows, -1, 0)
        reply = sampler.service.hop_begin({links.edge_type: request}).wait()[links.edge_type]
        found |= contains(reply.ids.numpy(), reply.counts.numpy(), src.numpy(), asked.numpy())
    return torch.from_numpy(np.asarray(found))
