r"""``partpar verify`` finds each planted damage, and nothing where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from graphs import directed_graph, typed_graph
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from partpar import GraphData
from partpar.cli.main import main
from partpar.partition import Manifest, read_manifest, verify
from partpar.partition.assemble import assemble
from partpar.partition.digest import file_digest
from partpar.partition.manifest import describe
from partpar.partition.verify import verify_partition

NODE, EDGE = "node/node/", "edge/node/to/node/"
Shares = list[dict[str, Tensor]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 3)


def _rewrite(folder: Path, change: Callable[[Shares, Manifest], Manifest | None]) -> None:
    r"""Changes shares and writes them with right sizes and checksums: damage that only contents can tell."""
    manifest = read_manifest(folder)
    shares = []
    for record in manifest.shares:
        with safe_open(folder / record.name, framework="pt") as file:
            shares.append({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    manifest = change(shares, manifest) or manifest
    records = []
    for record, tensors in zip(manifest.shares, shares, strict=True):
        path = folder / record.name
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"run_id": manifest.run_id})
        records.append(replace(record, num_bytes=path.stat().st_size, sha256=file_digest(path), tensors=describe(tensors)))
    (folder / "manifest.json").write_text(replace(manifest, shares=records).to_json())


def _shrink(manifest: Manifest, part: int) -> Manifest:
    r"""The manifest of a partition that has one edge less in a part."""
    (edge_type, offsets), report = manifest.edge_types[0], json.loads(json.dumps(manifest.report))
    report["num_edges"] -= 1
    report["edges"]["__".join(edge_type)]["edges"][part] -= 1
    return replace(manifest, edge_types=[(edge_type, [o - (p > part) for p, o in enumerate(offsets)])], report=report)


def a_missing_edge(shares: Shares, manifest: Manifest) -> Manifest:
    share = shares[1]
    share[EDGE + "indptr"][1 + int((share[EDGE + "indptr"] > 0).nonzero()[0]) - 1 :] -= 1
    for name in [n for n in share if n.startswith(EDGE) and not n.endswith("indptr")]:
        share[name] = share[name][1:]
    return _shrink(manifest, 1)


def a_node_owned_twice(shares: Shares, manifest: Manifest) -> None:
    shares[0][NODE + "raw_ids"][2] = shares[2][NODE + "raw_ids"][1]


def an_edge_twice(shares: Shares, manifest: Manifest) -> None:
    shares[0][EDGE + "raw_ids"][1] = shares[1][EDGE + "raw_ids"][0]


def swapped_shares(shares: Shares, manifest: Manifest) -> None:
    shares[0], shares[1] = shares[1], shares[0]


def a_foreign_halo(shares: Shares, manifest: Manifest) -> None:
    shares[0][NODE + "halo_raw_ids"][0] = shares[0][NODE + "raw_ids"][0]


def a_halo_that_no_edge_needs(shares: Shares, manifest: Manifest) -> None:
    indices = shares[0][EDGE + "indices"]
    indices[indices == manifest.node_offsets["node"][1]] = 0


def edges_out_of_order(shares: Shares, manifest: Manifest) -> None:
    indptr = shares[0][EDGE + "indptr"]
    first = int(indptr[(indptr.diff() > 1).nonzero()[0]])
    for name in [n for n in shares[0] if n.startswith(EDGE) and not n.endswith("indptr")]:
        shares[0][name][[first, first + 1]] = shares[0][name][[first + 1, first]]


def an_index_out_of_bounds(shares: Shares, manifest: Manifest) -> None:
    shares[2][EDGE + "indices"][0] = 10**6


def another_value(shares: Shares, manifest: Manifest) -> None:
    shares[2][NODE + "attr/x"][0, 0] += 1


def another_end(shares: Shares, manifest: Manifest) -> None:
    indices, owned = shares[1][EDGE + "indices"], manifest.node_offsets["node"][2] - manifest.node_offsets["node"][1]
    place = int((indices < owned).nonzero()[0])
    indices[place] = (indices[place] + 1) % owned


def a_false_report(shares: Shares, manifest: Manifest) -> Manifest:
    report = json.loads(json.dumps(manifest.report))
    report["nodes"]["node"]["halo"][0] += 1
    return replace(manifest, report=report)


def other_arguments(shares: Shares, manifest: Manifest) -> Manifest:
    return replace(manifest, arguments={**manifest.arguments, "node_weight": ["train_mask"]})


def a_row_less(shares: Shares, manifest: Manifest) -> None:
    shares[0][NODE + "attr/y"] = shares[0][NODE + "attr/y"][1:]


CONTENTS = [
    (a_missing_edge, "edge(s) of type node-to-node|digest"),
    (a_node_owned_twice, "node(s) of type node are in two shares"),
    (an_edge_twice, "edge(s) of type node-to-node are in two shares"),
    (swapped_shares, "expected"),
    (a_foreign_halo, "have other raw ids than at their owners"),
    (a_halo_that_no_edge_needs, "are the source of no edge"),
    (edges_out_of_order, "not in the order of their raw ids"),
    (an_index_out_of_bounds, "expected"),
    (another_value, "digest"),
    (another_end, "digest"),
    (a_false_report, "its report says"),
    (other_arguments, "digest"),
    (a_row_less, "rows in 'node/node/attr/y'"),
]


@pytest.mark.parametrize(("damage", "told"), CONTENTS, ids=[d.__name__ for d, _ in CONTENTS])
def test_damage_with_right_checksums_is_found(damage: Callable, told: str, folder: Path) -> None:
    _rewrite(folder, damage)
    found = verify_partition(folder)
    assert any(part in f.what for f in found.findings for part in told.split("|")), found


def test_rewriting_alone_is_no_damage(folder: Path) -> None:
    _rewrite(folder, lambda shares, manifest: None)
    assert verify_partition(folder).whole


def test_every_flipped_bit_of_a_share_is_found(folder: Path) -> None:
    path = folder / "001.safetensors"
    whole = path.read_bytes()
    for place in torch.randint(len(whole) * 8, (12,), generator=torch.Generator().manual_seed(0)).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = verify_partition(folder)
        assert [f.file for f in found.findings] == ["001.safetensors"], place
    path.write_bytes(whole)
    assert verify_partition(folder).whole


def test_files_that_changed_places_are_found(folder: Path) -> None:
    one, other = folder / "000.safetensors", folder / "001.safetensors"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    assert {f.file for f in verify_partition(folder).findings} >= {"000.safetensors", "001.safetensors"}


@pytest.mark.parametrize("options", [{}, {"algorithm": "ldg", "partition_kwargs": {"passes": 2, "seed": 3}}, {"edge": 1}])
def test_typed_partitions_with_windows_are_whole(options: dict, tmp_path: Path) -> None:
    data = typed_graph()
    graph = GraphData.from_pyg_data(data)
    if options.pop("edge", 0):
        options = {"edge_weight": dict.fromkeys(graph.edge_types, 2.0), "node_weight": ["#nodes:*"]}
    folder = graph.partition_graph(tmp_path, 2, time_attr="t", num_snapshots=3, **options)
    found = verify_partition(folder)
    assert found.whole, found.findings
    assert len(found.checks) == 7
    again = assemble(folder)
    for edge_type in graph.edge_types:
        assert again.edge_index(edge_type).equal(graph.edge_index(edge_type))
        assert again.edge(edge_type)["t"].equal(graph.edge(edge_type)["t"])
    assert all(again.node(t)["x"].equal(graph.node(t)["x"]) for t in graph.node_types)


def test_the_command_prints_checks_and_exits_by_them(folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr()
    assert "every node is owned once" in said.out
    assert said.err == ""
    assert main(["verify", str(tmp_path), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True
    _rewrite(folder, a_node_owned_twice)
    assert main(["verify", str(folder), "--json", str(tmp_path / "found.json")]) == 1
    said = capsys.readouterr()
    assert "are in two shares" in said.err
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["whole"] is False
    assert told["findings"][0]["file"] == "002.safetensors"


# Each check taken away, and the damage that goes unnoticed then.
MUTANTS = [
    ("_once", lambda *args: [], a_node_owned_twice),
    ("_halos", lambda *args: [], a_foreign_halo),
    ("_report", lambda *args: [], a_false_report),
    ("_digest", lambda *args: [], another_value),
    ("_described", lambda *args: [], a_row_less),
]


@pytest.mark.parametrize(("check", "nothing", "damage"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_each_check_is_needed(check: str, nothing: Callable, damage: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _rewrite(folder, damage)
    told = [asdict(f) for f in verify_partition(folder, contents=check == "_digest").findings]
    monkeypatch.setattr(verify, check, nothing)
    assert [asdict(f) for f in verify_partition(folder, contents=False).findings] != told
