r"""Sequences of calls on sharded tensors and embeddings, and the same on dense ones: cases of ``test_sharded.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from gang import Worker
from torch import Tensor

from partpar.sharded import (
    DistEmbedding,
    DistTensor,
    Normal,
    SparseAdagrad,
    SparseAdam,
    SparseSGD,
    lookup,
)

OPTIMISERS = {"SGD": SparseSGD, "Adagrad": SparseAdagrad, "Adam": SparseAdam}
LR = {"SGD": 0.5, "Adagrad": 0.25, "Adam": 0.125}
COLUMNS = 3


@dataclass(frozen=True)
class Call:
    r"""One collective call: ``what``, and for each of some number of dealt hands the ids and values (multiples of 1/8)
    that it brings. A worker plays the hands dealt to it: so the same calls run on any number of workers."""

    what: str
    ids: tuple[tuple[int, ...], ...]
    seed: int = 0
    table: int = 0


@dataclass(frozen=True)
class Play:
    r"""What to play on a table of ``rows`` rows."""

    rows: int
    calls: tuple[Call, ...]
    optimiser: str = "SGD"
    offsets: tuple[float, ...] = field(default=())  # shares of the rows, for an uneven policy


def hand(call: Call, first: int, last: int) -> tuple[Tensor, Tensor]:
    r"""Ids and values of the hands ``first`` to ``last - 1``."""
    draw = torch.Generator().manual_seed(call.seed)
    everyone = [
        torch.randint(-16, 17, (len(ids), COLUMNS), generator=draw, dtype=torch.float64) / 8 for ids in call.ids
    ]
    ids = [torch.tensor(ids, dtype=torch.int64) for ids in call.ids]
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, COLUMNS, dtype=torch.float64)
    return torch.cat([nothing[0], *ids[first:last]]), torch.cat([nothing[1], *everyone[first:last]])


def dealt(worker: Worker, num_hands: int) -> tuple[int, int]:
    return worker.rank * num_hands // worker.world_size, (worker.rank + 1) * num_hands // worker.world_size


def policy_of(play: Play, world_size: int) -> tuple[int, ...] | None:
    r"""Uneven offsets, parts without rows among them, or none."""
    if not play.offsets:
        return None
    cuts = sorted(round(share * play.rows) for share in play.offsets[: world_size - 1])
    return (0, *cuts, play.rows)


def play_sharded(worker: Worker, play: Play) -> dict[str, Any]:
    r"""Plays on this worker; what each call returned here, and all rows at the end."""
    policy = policy_of(play, worker.world_size)
    t = DistTensor((play.rows, COLUMNS), torch.float64, "t", Normal(seed=5), policy)
    tables = [
        DistEmbedding(play.rows, COLUMNS, f"e{i}", Normal(seed=i), policy, torch.float64) for i in range(2)
    ]
    optimiser = OPTIMISERS[play.optimiser](tables, lr=LR[play.optimiser])
    told: list[Tensor] = []
    for call in play.calls:
        ids, values = hand(call, *dealt(worker, len(call.ids)))
        if call.what == "get":
            told.append(t[ids])
        elif call.what == "set":
            t[ids] = values
        elif call.what == "look":
            told.append(tables[call.table](ids).detach())
        elif call.what == "learn":
            rows = tables[call.table](ids)
            told.append(rows.detach().clone())
            rows.backward(values)
        elif call.what == "learn both":
            for rows in lookup({tables[0]: ids, tables[1]: play.rows - 1 - ids}).values():
                rows.backward(values)
        else:
            optimiser.step()
    everything = torch.arange(play.rows) if worker.rank == 0 else torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        ends = [t[everything], *lookup(dict.fromkeys(tables, everything)).values()]
    return {"told": told, "ends": ends, "noted": [len(table.noted) for table in tables]}


def play_dense(play: Play) -> dict[str, Any]:
    r"""Plays on dense tensors, by torch's own optimisers."""
    alone = Worker(0, 1, None)
    t = DistTensor((play.rows, COLUMNS), torch.float64, init_func=Normal(seed=5)).local_rows.clone()
    tables = [
        torch.nn.Embedding.from_pretrained(
            DistEmbedding(play.rows, COLUMNS, init_func=Normal(seed=i), dtype=torch.float64)
            .weight.local_rows.clone(),
            freeze=False, sparse=play.optimiser == "Adam",
        )
        for i in range(2)
    ]  # fmt: skip
    weights, lr = [table.weight for table in tables], LR[play.optimiser]
    make = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}
    optimiser = make[play.optimiser](weights, lr=lr)
    told: list[Tensor] = []
    for call in play.calls:
        ids, values = hand(call, *dealt(alone, len(call.ids)))
        if call.what == "get":
            told.append(t[ids])
        elif call.what == "set":
            for i, row in zip(ids.tolist(), values, strict=True):
                t[i] = row
        elif call.what == "look":
            told.append(tables[call.table](ids).detach())
        elif call.what in ("learn", "learn both"):
            if call.what == "learn":
                told.append(tables[call.table](ids).detach())
                tables[call.table](ids).backward(values)
            else:
                tables[0](ids).backward(values)
                tables[1](play.rows - 1 - ids).backward(values)
        else:
            optimiser.step()
            optimiser.zero_grad()
    return {"told": told, "ends": [t, *(weight.detach() for weight in weights)]}
