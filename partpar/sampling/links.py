r"""Sampling from links: their ends are seeds, and the links are found again among the sampled nodes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch_geometric.sampler import NegativeSampling

from partpar.errors import SamplingError
from partpar.sampling.negative import draw_negatives
from partpar.sampling.subgraph import BatchKey, LinkLabels, LinkSeeds, SampledSubgraph, Seeds

if TYPE_CHECKING:
    from partpar.sampling.neighbor_sampler import NeighborSampler


def sample_links(
    sampler: NeighborSampler,
    links: LinkSeeds,
    key: BatchKey,
    negatives: NegativeSampling | None,
    strict: bool,
) -> SampledSubgraph:
    """See :meth:`NeighborSampler.sample_edges`."""
    _check(sampler, links, negatives)
    src_type, _, dst_type = links.edge_type
    num_pos = links.src.ids.numel()
    src, dst, times, label = links.src, links.dst, links.times, links.label
    triplets = negatives is not None and negatives.is_triplet()
    if negatives is not None:
        num_neg = math.ceil(num_pos * negatives.amount)
        neg_src, neg_dst = draw_negatives(sampler, links, key, negatives, num_neg, strict)
        if not triplets:
            src = _join(src, neg_src)
            label = torch.ones(num_pos) if label is None else label
            label = torch.cat([label, label.new_zeros(num_neg, *label.shape[1:])])
        dst = _join(dst, neg_dst)
    if times is not None and num_pos:  # a negative link is of the time of a positive one
        src, dst = (replace(end, times=times[torch.arange(end.ids.numel()) % num_pos]) for end in (src, dst))

    if src_type == dst_type:
        ends = {src_type: _join(src, dst)}
        split = src.ids.numel()
    else:
        ends = {src_type: src, dst_type: dst}
        split = 0
    places: dict[str, Tensor] = {}
    if sampler.disjoint:
        places = {t: torch.arange(end.ids.numel()) for t, end in ends.items()}
    else:
        for node_type, end in ends.items():
            ends[node_type], places[node_type] = _once(end)
    out = sampler.sample_nodes(ends, key)
    src_at, dst_at = places[src_type][: src.ids.numel()], places[dst_type][split:]
    if out.batch is not None:
        # Trees of both ends of a link, and of its negatives, carry its number.
        link_of = torch.cat([torch.arange(end.ids.numel()) % max(num_pos, 1) for end in (src, dst)])
        out = replace(out, batch={t: link_of[groups] for t, groups in out.batch.items()})
    if not triplets:
        all_times = src.times if times is not None else None
        return replace(out, labels=LinkLabels(torch.stack([src_at, dst_at]), label, time=all_times))
    # The a-th negative of link i is drawn as number a * num_pos + i, which gives it the link's number and time.
    neg_at = dst_at[num_pos:].view(-1, num_pos).t() if num_pos else dst_at.view(0, 1)
    return replace(
        out,
        labels=LinkLabels(
            src_index=src_at, dst_pos_index=dst_at[:num_pos], dst_neg_index=neg_at.squeeze(-1), time=times
        ),
    )


def _check(sampler: NeighborSampler, links: LinkSeeds, negatives: NegativeSampling | None) -> None:
    src_type, _, dst_type = links.edge_type
    missing = {src_type, dst_type} - set(sampler.service.node_types)
    if missing:
        raise SamplingError(
            f"links of type {links.edge_type}: expected ends among {list(sampler.service.node_types)}, found {sorted(missing)}"
        )
    n = links.src.ids.numel()
    sizes = {"dst": links.dst.ids.numel()}
    if links.label is not None:
        sizes["label"] = links.label.size(0)
    if links.times is not None:
        sizes["times"] = links.times.numel()
    for name, size in sizes.items():
        if size != n:
            raise SamplingError(f"links: expected {n} of {name}, as many as sources, found {size}")
    if sampler.time_attr is not None and links.times is None:
        raise SamplingError(
            f"links: expected a time for each, since {sampler.time_attr!r} restricts what is sampled; give edge_label_time"
        )
    if links.times is not None and not sampler.disjoint:
        raise SamplingError(
            "links: expected times with disjoint sub-graphs only, found disjoint=False; give disjoint=True or time_attr"
        )
    if negatives is not None and negatives.is_triplet() and links.label is not None:
        raise SamplingError(
            "links: expected no labels for triplets, found some; use binary negative sampling"
        )


def _join(a: Seeds, b: Seeds) -> Seeds:
    times = None if a.times is None or b.times is None else torch.cat([a.times, b.times])
    return Seeds(torch.cat([a.ids, b.ids]), torch.cat([a.raw_ids, b.raw_ids]), times)


def _once(seeds: Seeds) -> tuple[Seeds, Tensor]:
    r"""Each node once, by raw id, an order that no partition changes; and where each seed stands among them."""
    raw_ids, place = seeds.raw_ids.unique(return_inverse=True)
    ids = torch.empty_like(raw_ids)
    ids[place] = seeds.ids
    return Seeds(ids, raw_ids), place
