r"""Mistakes put into the service on purpose, each of which its tests must notice; listed in ``MUTANTS.rst``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import directed_graph
from test_serving import NODE, check_hops, check_rows, cut, together
from torch import Tensor

from partpar.errors import PartparError, RemoteError
from partpar.serving import raw_ids, service, transport
from partpar.serving.cache import Kept, RowCache
from partpar.serving.flights import Split
from partpar.serving.owner import Owner
from partpar.serving.service import Service

Patch = pytest.MonkeyPatch


def keep_order_of_owners(patch: Patch) -> None:
    r"""Rows stand as their owners sent them."""
    pieces = Split.pieces

    def mutant(self: Split, own: int) -> dict[int, tuple[Tensor, Tensor]]:
        out, start = {}, 0
        for part, (places, rows) in pieces(self, own).items():
            out[part] = torch.arange(start, start + places.numel()), rows
            start += places.numel()
        return out

    patch.setattr(Split, "pieces", mutant)


def take_the_neighbouring_row(patch: Patch) -> None:
    split = Kept.split

    def mutant(self: Kept, *args: Tensor) -> tuple[Tensor, Tensor]:
        slots, places = split(self, *args)
        return (slots + 1).remainder(self.rows.size(0)), places

    patch.setattr(Kept, "split", mutant)


def keep_what_was_changed(patch: Patch) -> None:
    patch.setattr(RowCache, "forget", lambda self, node_type, name: None)


def first_put_stays(patch: Patch) -> None:
    put = Owner.put

    def mutant(self: Owner, tensors: dict[str, Tensor], values: dict) -> dict[str, Tensor]:
        return put(self, {name: tensor.flip(0) for name, tensor in tensors.items()}, values)

    patch.setattr(Owner, "put", mutant)


def forget_where_parts_begin(patch: Patch) -> None:
    r"""The directory takes a row for an id."""
    make = raw_ids.Directory._make

    def mutant(self: raw_ids.Directory, kind: object) -> tuple[Tensor, Tensor]:
        offsets = self.offsets
        self.offsets = lambda kind: torch.zeros_like(offsets(kind))
        try:
            return make(self, kind)
        finally:
            self.offsets = offsets

    patch.setattr(raw_ids.Directory, "_make", mutant)


def number_edges_in_each_part(patch: Patch) -> None:
    r"""An edge's id says only where it stands in its part."""
    hop = Owner.hop

    def mutant(self: Owner, request: object) -> object:
        reply = hop(self, request)
        if reply.edge_rows is not None:
            reply.edge_rows.remainder_(max(self.share.num_edges() // 2, 1))
        return reply

    patch.setattr(Owner, "hop", mutant)


def take_any_value(patch: Patch) -> None:
    patch.setattr(transport, "check_message", lambda tensors, values: None)


def swallow_errors(patch: Patch) -> None:
    patch.setattr(transport, "failure", lambda who, verb, trace: None)


def look_at_no_bounds(patch: Patch) -> None:
    r"""An id outside goes to the last part."""
    place = service.place_ids

    def mutant(ids: Tensor, offsets: Tensor, *args: object) -> int:
        return place(ids.clip(0, int(offsets[-1]) - 1), offsets, *args)

    patch.setattr(service, "place_ids", mutant)


MUTANTS: list[Callable[[Patch], None]] = [
    keep_order_of_owners,
    take_the_neighbouring_row,
    keep_what_was_changed,
    first_put_stays,
    forget_where_parts_begin,
    number_edges_in_each_part,
    take_any_value,
    swallow_errors,
    look_at_no_bounds,
]


def promises_hold(root: Path) -> bool:
    r"""What the tests of the service look at, in one process."""
    try:
        data = directed_graph()
        services = together(root, 2)
        for one in services:
            check_rows(one, data)
            check_hops(one, root, 2)
        check_puts(services)
        check_refusals(services[0])
    except (AssertionError, PartparError, AttributeError):
        return False
    return True


def check_puts(services: list[Service]) -> None:
    ids = torch.tensor([3, 57, 3])
    rows = torch.arange(3.0, dtype=torch.float64)[:, None].expand(3, 8).contiguous()
    services[0].put(NODE, "x", ids, rows)
    for one in services:
        assert one.node_rows(NODE, "x", ids)[:, 0].tolist() == [2.0, 1.0, 2.0]


def check_refusals(one: Service) -> None:
    one.register("echo", lambda tensors, values: tensors)
    for part, verb, values in ((0, "echo", {"a": object()}), (1, "nothing", {})):
        try:
            one.begin(part, verb, {}, values).wait()
        except RemoteError:
            continue
        raise AssertionError("expected an error")
    try:
        one.node_rows(NODE, "x", torch.tensor([1, 99]))
    except PartparError:
        return
    raise AssertionError("expected an error")


def test_without_a_mutant_all_promises_hold(tmp_path: Path) -> None:
    cut(tmp_path, 2)
    assert promises_hold(tmp_path)


@pytest.mark.parametrize("mutate", MUTANTS, ids=[mutate.__name__ for mutate in MUTANTS])
def test_mutant_is_noticed(tmp_path: Path, monkeypatch: Patch, mutate: Callable[[Patch], None]) -> None:
    cut(tmp_path, 2)
    mutate(monkeypatch)
    assert not promises_hold(tmp_path)


def test_all_are_listed() -> None:
    listed = Path(__file__).with_name("MUTANTS.rst").read_text()
    assert [mutate.__name__ for mutate in MUTANTS if f"``{mutate.__name__}``" not in listed] == []
