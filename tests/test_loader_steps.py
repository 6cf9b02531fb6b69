r"""Who takes which seeds in how many steps, and what loaders refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gang import Gang, Worker
from graphs import directed_graph
from loader_cases import SEEDS, open_share, parts
from partpar.models import GraphSAGE
from torch.nn.parallel import DistributedDataParallel

from partpar.errors import SamplingError, StaleIteratorError
from partpar.sampling import DistLinkNeighborLoader, DistNeighborLoader, blocks
from partpar.sampling.inputs import Steps, share_out
from partpar.serving import agent

assert parts  # the fixture


def test_steps_lose_no_seed_unless_asked() -> None:
    counts = [10, 3, 0]
    for rank, count in enumerate(counts):
        split = Steps.agree(counts, rank, 4, False, "split")
        assert split.steps == 3
        seen = [i for k in range(3) for i in split.bounds(k)]
        assert sorted(seen) == list(range(count))
        assert Steps.agree(counts, rank, 4, True, "split").steps == 0
        assert Steps.agree(counts, rank, 4, False, "stop").steps == 0
    padded = Steps.agree([10, 3], 1, 4, False, "pad")
    assert [[i % 3 for i in padded.bounds(k)] for k in range(3)] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    few = Steps.agree([12, 2], 1, 4, False, "split")
    assert [len(few.bounds(k)) for k in range(3)] == [1, 1, 1]


def test_common_seeds_are_shared_out_local_ones_first() -> None:
    owners = torch.tensor([0] * 9 + [1] * 3)
    ranks = share_out(owners, 2, 2)
    assert torch.bincount(ranks).tolist() == [6, 6]
    assert ranks[9:].tolist() == [1, 1, 1]
    assert torch.bincount(share_out(owners, 2, 4)).tolist() == [3, 3, 3, 3]
    assert share_out(owners[:0], 2, 4).numel() == 0


def seeds_case(worker: Worker, root: str) -> list[list[int]]:
    share, data = open_share(worker, root), directed_graph()
    out = []
    inputs: tuple[tuple[Any, dict[str, Any]], ...] = (
        (data.train_mask, {}),
        (data.train_mask.nonzero().flatten(), {"seeds": "shared"}),
        (share.node()["train_mask"], {}),
        (None, {}),
    )
    for given, more in inputs:
        with DistNeighborLoader(share, [2], given, batch_size=8, shuffle=True, **more) as loader:
            out.append(torch.cat([b.n_id[: b.batch_size] for b in loader]).tolist())
    return out


def test_masks_are_shared_out_and_every_seed_comes_once(gang: Gang, parts: str) -> None:
    data = directed_graph()
    train = data.train_mask.nonzero().flatten().tolist()
    told = gang.run(seeds_case, 2, parts)
    for k, expected in enumerate((train, train, train, list(range(60)))):
        assert sorted(i for rank in told for i in rank[k]) == expected
    assert abs(len(told[0][0]) - len(told[1][0])) <= 1


def test_what_does_not_fit_is_refused() -> None:
    data = directed_graph()
    for arguments, said in (
        ({"input_nodes": data.x[:, 0]}, "integer ids or a bool mask"),
        ({"input_nodes": torch.ones(7, dtype=torch.bool)}, "mask of all 60 nodes"),
        ({"input_nodes": ("other", None)}, "expected a node type of"),
        ({"input_nodes": torch.tensor([60])}, "60"),
        ({"input_time": torch.arange(60)}, "expected time_attr as well"),
        ({"uneven": "fair"}, "expected one of split, pad, stop"),
        ({"batch_size": 0}, "at least 1"),
        ({"attributes": ["z"]}, r"found \['z'\]"),
        ({"seeds": "mine"}, "expected 'own'"),
    ):
        with pytest.raises(ValueError, match=said):
            DistNeighborLoader(data, [2], **arguments)
    with pytest.raises(ValueError, match="expected time_attr as well"):
        DistLinkNeighborLoader(data, [2], edge_label_time=torch.arange(275))
    with pytest.raises(ValueError, match="expected a share"):
        DistNeighborLoader("graph", [2])


@pytest.mark.parametrize("given", [10, {("node", "to", "node"): 10}, "10"])
def test_one_fan_out_is_no_list_of_them(given: Any) -> None:
    with pytest.raises(SamplingError, match=r"a number for each hop, such as \[10, 5\], found '?10"):
        DistNeighborLoader(directed_graph(), given)


def wrong_seed_case(worker: Worker, root: str, link: bool) -> None:
    share = open_share(worker, root)
    seeds = torch.tensor([1, 70000 if worker.rank == 1 else 2])
    try:
        if link:
            DistLinkNeighborLoader(share, [2], seeds.view(2, 1))
        else:
            DistNeighborLoader(share, [2], seeds)
    finally:  # the service outlives the refusal: the next loader takes it, and ends it
        with DistNeighborLoader(share, [2], batch_size=8) as loader:
            assert len(list(loader)) == len(loader)
        assert not agent.is_running()


@pytest.mark.parametrize("link", [False, True])
def test_a_wrong_seed_of_one_rank_raises_on_all(gang: Gang, parts: str, link: bool) -> None:
    for outcome, kind in zip(gang.run_expecting_errors(wrong_seed_case, 2, parts, link, timeout=20), ("SamplingError", "IdError"), strict=True):
        assert outcome is not None
        assert outcome[0] == kind
        assert "rank 1: expected raw ids of 'node', found 1 that no part has, the first 70000" in outcome[1]


@pytest.mark.parametrize("concurrency", [0, 2])
def test_an_iterator_that_another_replaced_says_so(concurrency: int) -> None:
    loader = DistNeighborLoader(directed_graph(), [2], SEEDS, batch_size=4, concurrency=concurrency)
    old = iter(loader)
    next(old)
    assert len(list(loader)) == 3
    for _ in range(2):
        with pytest.raises(StaleIteratorError, match="iterated anew.*epoch 0, of which 1 batches were read"):
            next(old)
    old = iter(loader)
    assert len(list(old)) == len(list(loader)) == 3
    assert list(old) == [], "one that was read to its end stays at it"
    old = iter(loader)
    next(old)
    loader.close()
    assert list(old) == []


def ids_case(worker: Worker, root: str) -> None:
    share = open_share(worker, root)
    with DistNeighborLoader(share, [2], batch_size=8) as loader:
        for batch in loader:
            ids, low = loader.ids_of(batch.n_id), int(share.offsets("node")[worker.rank])
            here = (ids >= low) & (ids < low + share.num_owned())
            assert here[: batch.batch_size].all(), "seeds are a worker's own nodes"
            assert torch.equal(share.node()["raw_ids"][ids[here] - low], batch.n_id[here])
        with pytest.raises(ValueError, match="60"):
            loader.ids_of(torch.tensor([60]))


def test_ids_of_nodes_in_a_batch_are_found(gang: Gang, parts: str) -> None:
    gang.run(ids_case, 2, parts)


def unequal_case(worker: Worker, root: str) -> tuple[int, int]:
    r"""Two loaders, used in turn under DDP, on ranks whose seeds are 20 and 5."""
    share = open_share(worker, root)
    own = share.node()["raw_ids"]
    train = DistNeighborLoader(share, [2, 2], own[: 20 if worker.rank == 0 else 5], batch_size=4, shuffle=True)
    test = DistNeighborLoader(share, [2, 2], own[:6], batch_size=1)
    model = DistributedDataParallel(GraphSAGE(8, 4, 2, 4).double(), process_group=worker.group)
    steps = [0, 0]
    for _ in range(2):
        for k, loader in enumerate((train, test)):
            for batch in loader:
                out = model(batch.x, blocks(batch))
                F.cross_entropy(out, batch.y[: batch.batch_size]).backward()
                steps[k] += 1
    test.close()
    train.close()
    return steps[0], steps[1]


def test_unequal_ranks_take_equal_steps(gang: Gang, parts: str) -> None:
    assert gang.run(unequal_case, 2, parts) == [(10, 12), (10, 12)]
