r"""From what users call seeds to the seeds of one rank: ids, masks, types; whose they are, and in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partpar.errors import SamplingError
from partpar.graph import EdgeType, GraphData
from partpar.kernels import counter

UNEVEN = ("split", "pad", "stop")
_SHUFFLE = 0x5EED  # what tells the draws of shuffling from all others


@dataclass(frozen=True)
class NodeInputs:
    r"""The seeds that one rank was given.

    Args:
        node_type: Of all of them.
        raw_ids: ``[n]`` int64.
        input_id: ``[n]`` int64, the place of each in what the user gave.
        common: Whether all ranks were given these, to be shared out.
    """

    node_type: str
    raw_ids: Tensor
    input_id: Tensor
    common: bool = False


def node_inputs(share: GraphData, input_nodes: Any, seeds: str, each: int, number: int) -> NodeInputs:
    r"""Reads ``input_nodes``.

    Args:
        share: This rank's.
        input_nodes: :obj:`None`, ids, a mask, a node type, or a pair of a node type and one of these. A mask has a row
            for each node of the graph, or for each that this rank's share owns.
        seeds: ``"own"``: ids are this rank's own; ``"shared"``: those of all ranks.
        each: How many ranks stand for one part.
        number: Which of them this one is.

    Raises:
        SamplingError: It is none of these.
    """
    if seeds not in ("own", "shared"):
        raise SamplingError(f"seeds: expected 'own' (each rank gives its own) or 'shared', found {seeds!r}")
    node_type, given = _typed(share, input_nodes)
    owned = share.node(node_type)
    num_nodes = int(share.offsets(node_type)[-1])
    own_raw_ids = owned["raw_ids"] if "raw_ids" in owned else torch.arange(owned.num_rows)
    if given is None:
        given = torch.ones(owned.num_rows, dtype=torch.bool)
    given = torch.as_tensor(given)
    if given.dim() != 1:
        raise SamplingError(f"input_nodes: expected ids [n] or a mask, found shape {tuple(given.shape)}")
    if given.dtype == torch.bool:
        if given.numel() == owned.num_rows:  # of the nodes of one part, whose ranks share them out
            rows = given.nonzero().flatten().tensor_split(each)[number]
            return NodeInputs(node_type, own_raw_ids[rows], own_raw_ids[rows])
        if given.numel() != num_nodes:
            raise SamplingError(
                f"input_nodes: expected a mask of all {num_nodes} nodes of type {node_type!r} or of the {owned.num_rows} owned "
                f"here, found one of {given.numel()}"
            )
        raw_ids = given.nonzero().flatten()
        return NodeInputs(node_type, raw_ids, raw_ids, common=True)
    if given.is_floating_point() or given.is_complex():
        raise SamplingError(f"input_nodes: expected integer ids or a bool mask, found {given.dtype}")
    raw_ids = given.to(torch.int64)
    return NodeInputs(node_type, raw_ids, torch.arange(raw_ids.numel()), common=seeds == "shared")


def _typed(share: GraphData, given: Any) -> tuple[str, Any]:
    if isinstance(given, str):
        given = (given, None)
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], str | None):
        node_type, given = given
    else:
        node_type = None
    if node_type is None and len(share.node_types) > 1:
        raise SamplingError(
            f"input_nodes: expected a node type of {share.node_types}, or (type, ids), found no type; name one"
        )
    if node_type is not None and node_type not in share.node_types:
        raise SamplingError(f"input_nodes: expected a node type of {share.node_types}, found {node_type!r}")
    return node_type or share.node_types[0], given


def link_type(share: GraphData, given: Any) -> tuple[EdgeType, Tensor | None]:
    r"""Reads ``edge_label_index``: the type, and ``[2, n]`` raw ids or :obj:`None` for this share's own edges.

    Raises:
        SamplingError: It is neither of these, nor an edge type, nor a pair of a type and one of these.
    """
    edge_type: Any = None
    if isinstance(given, (tuple, list)) and given and isinstance(given[0], str):
        edge_type, given = tuple(given), None
    elif isinstance(given, (tuple, list)) and len(given) == 2 and not (
        isinstance(given[0], Tensor) and isinstance(given[1], Tensor)
    ):
        edge_type, given = given[0], given[1]
    if edge_type is None:
        if len(share.edge_types) > 1:
            raise SamplingError(
                f"edge_label_index: expected an edge type of {share.edge_types}, or (type, ids), found no type; name one"
            )
        edge_type = share.edge_types[0]
    edge_type = tuple(edge_type)
    if len(edge_type) == 2:  # PyG's short form
        fitting = [t for t in share.edge_types if (t[0], t[2]) == edge_type]
        edge_type = fitting[0] if len(fitting) == 1 else edge_type
    if len(edge_type) != 3 or {edge_type[0], edge_type[2]} - set(share.node_types):
        raise SamplingError(f"edge_label_index: expected an edge type of {share.edge_types}, found {edge_type}")
    if given is None:
        if edge_type not in share.edge_types:
            raise SamplingError(f"edge_label_index: expected ids for {edge_type}, which is no edge type of the graph")
        return edge_type, None
    index = torch.stack(list(given)) if isinstance(given, (tuple, list)) else given
    if index.dim() != 2 or index.size(0) != 2 or index.dtype == torch.bool or index.is_floating_point():
        raise SamplingError(
            f"edge_label_index: expected integers [2, n], found {index.dtype} of shape {tuple(index.shape)}"
        )
    return edge_type, index.to(torch.int64)


def share_out(parts: Tensor, num_parts: int, world_size: int) -> Tensor:
    r"""Deals seeds that all ranks were given: each rank takes those of its part first, then all are levelled.

    Args:
        parts: ``[n]`` int64, who owns each seed.
        num_parts: Number of parts.
        world_size: A multiple of it.

    Returns:
        ``[n]`` int64: the rank of each. Ranks differ by one seed at most.
    """
    owner, each, total = parts.numpy(), world_size // num_parts, parts.numel()
    by_part = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=num_parts)
    place = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    sorted_owner = owner[by_part]
    rank = sorted_owner * each + place * each // np.maximum(sizes[sorted_owner], 1)
    quota = total // world_size + (np.arange(world_size) < total % world_size)
    held = np.bincount(rank, minlength=world_size)
    place = np.arange(total) - np.repeat(np.cumsum(held) - held, held)  # ranks rise along the sorted seeds
    over = place >= quota[rank]
    rank[over] = np.repeat(np.arange(world_size), np.maximum(quota - held, 0))
    out = np.empty(total, np.int64)
    out[by_part] = rank
    return torch.from_numpy(out)


@dataclass(frozen=True)
class Steps:
    r"""How one rank's seeds fall into batches, so that all ranks have as many.

    Args:
        count: Seeds of this rank.
        batch_size: Of a batch at most.
        steps: Batches of each rank.
        uneven: What a rank with fewer batches does: ``"split"`` its seeds into smaller batches, or ``"pad"``: begin again
            with the first.
    """

    count: int
    batch_size: int
    steps: int
    uneven: str = "split"

    @classmethod
    def agree(cls, counts: Sequence[int], rank: int, batch_size: int, drop_last: bool, uneven: str) -> Steps:
        r"""The batches of one rank, from the number of seeds of all. ``drop_last`` and ``uneven="stop"`` end with the
        rank that is through first; the others lose no seed."""
        full = [c // batch_size for c in counts]
        whole = [-(-c // batch_size) for c in counts]
        steps = min(full) if drop_last else min(whole) if uneven == "stop" else max(whole)
        return cls(counts[rank], batch_size, steps, uneven)

    def bounds(self, number: int) -> range:
        r"""Places of a batch's seeds in this epoch's order; to be taken modulo :obj:`count`. A rank with fewer seeds than
        steps repeats some; one without any has empty batches."""
        if self.count == 0:
            return range(0)
        if self.steps <= -(-self.count // self.batch_size):
            return range(number * self.batch_size, min((number + 1) * self.batch_size, self.count))
        if self.uneven == "pad":
            return range(number * self.batch_size, (number + 1) * self.batch_size)
        low = number * self.count // self.steps
        return range(low, max((number + 1) * self.count // self.steps, low + 1))


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    r"""A permutation that depends on seed and epoch alone."""
    keys = counter.uniform(seed, epoch, _SHUFFLE, torch.arange(count), 1, torch.float64)
    return keys.flatten().argsort(stable=True)
