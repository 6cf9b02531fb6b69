r"""Nothing damaged, missing or led elsewhere is taken for a partition; a checksum is read once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graphs import directed_graph
from safetensors.torch import load_file, save_file

from partpar import GraphData
from partpar.errors import (
    MissingPartitionError,
    PartitionFileError,
)
from partpar.partition import read_manifest
from partpar.partition.digest import file_digest

pytestmark = pytest.mark.usefixtures("fresh_stamps")



def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def truncate(folder: Path) -> None:
    os.truncate(folder / "000.safetensors", 100)


def flip(folder: Path) -> None:
    raw = bytearray((folder / "000.safetensors").read_bytes())
    raw[-5] ^= 4
    (folder / "000.safetensors").write_bytes(raw)


def other_run(folder: Path) -> None:
    tensors = load_file(folder / "000.safetensors")
    save_file(tensors, folder / "000.safetensors", metadata={"run_id": "0" * 32})
    resign(folder)


def poke(key: str, value: int) -> Callable[[Path], None]:
    r"""Writes a wrong index and makes checksums fit, as a faulty writer would."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "000.safetensors")
        tensors[key][-1] = value
        save_file(tensors, folder / "000.safetensors", metadata={"run_id": read_manifest(folder).run_id})
        resign(folder)

    return apply


def resign(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["shares"][0]["sha256"] = file_digest(folder / "000.safetensors")
        manifest["shares"][0]["num_bytes"] = (folder / "000.safetensors").stat().st_size

    edit(change)(folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing share": (lambda f: (f / "000.safetensors").unlink(), MissingPartitionError, "expected a file, found none"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), MissingPartitionError, "expected the manifest"),
    "truncated": (truncate, PartitionFileError, "expected [0-9]+ bytes, found 100"),
    "flipped": (flip, PartitionFileError, "expected the checksum [0-9a-f]+, found [0-9a-f]+"),
    "other run": (other_run, PartitionFileError, "expected a share of run [0-9a-f]+, found one of run 00000000"),
    "newer": (edit(lambda m: m.update(format_version=2)), PartitionFileError, "expected format version 1 to 1, found 2"),
    "foreign": (edit(lambda m: m.update(format="other")), PartitionFileError, "expected the format 'partpar', found 'other'"),
    "no json": (lambda f: (f / "manifest.json").write_text("{"), PartitionFileError, "expected JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), PartitionFileError, "found 'list'"),
    "no shares": (edit(lambda m: m.update(shares=[])), PartitionFileError, "expected 2 shares, found 0"),
    "escaping": (edit(lambda m: m["shares"][0].update(name="../x")), PartitionFileError, "found '../x'"),
    "negative": (edit(lambda m: m["shares"][0].update(num_bytes=-1)), PartitionFileError, "expected a count, found -1"),
    "offsets": (edit(lambda m: m["node_offsets"].update(node=[0, 9, 3])), PartitionFileError, "offsets that rise"),
    "dtype": (edit(lambda m: m["shares"][0]["tensors"]["node/node/raw_ids"].__setitem__(0, "float32")), PartitionFileError, "float32"),
    "not a dtype": (edit(lambda m: m["shares"][0]["tensors"]["node/node/raw_ids"].__setitem__(0, "Tensor")), PartitionFileError, "is no dtype"),
    "parts": (edit(lambda m: m.update(num_parts=True)), PartitionFileError, "expected a count, found True"),
    "source too large": (poke("edge/node/to/node/indices", 10**6), PartitionFileError, r"expected [0-9]+ numbers from 0 to"),
    "source negative": (poke("edge/node/to/node/indices", -1), PartitionFileError, r"expected [0-9]+ numbers from 0 to"),
    "indptr falls": (poke("edge/node/to/node/indptr", 1), PartitionFileError, "rise from 0 to"),
    "halo too large": (poke("node/node/halo_ids", 10**6), PartitionFileError, "expected ascending ids below 60"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(tmp_path: Path, damage: str) -> None:
    folder = GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2)
    GraphData.load_partition(tmp_path, 0, 2).node()["x"]
    hurt, kind, message = DAMAGE[damage]
    hurt(folder)
    with pytest.raises(kind, match=message) as caught:
        share = GraphData.load_partition(tmp_path, 0, 2)
        share.node()["raw_ids"]
    assert str(folder) in str(caught.value), "the message names the path"


def test_link_is_not_followed(tmp_path: Path) -> None:
    folder = GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2)
    shutil.move(folder / "000.safetensors", tmp_path / "elsewhere")
    (folder / "000.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingPartitionError, match="expected a file, found a link"):
        GraphData.load_partition(tmp_path, 0, 2)


def test_missing_partition_names_those_found(tmp_path: Path) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2)
    with pytest.raises(
        MissingPartitionError, match="expected a partition in 3 parts by 'metis', found metis_2"
    ):
        GraphData.load_partition(tmp_path, 0, 3)
    with pytest.raises(MissingPartitionError, match="; start 2 workers .torchrun --standalone --nproc-per-node 2 SCRIPT.,"):
        GraphData.load_partition(tmp_path)  # one process
    with pytest.raises(MissingPartitionError, match="; pass algorithm='metis', or cut"):
        GraphData.load_partition(tmp_path, 0, 2, "random")
    with pytest.raises(MissingPartitionError, match=f"found a partition itself; pass its parent, '{tmp_path}'"):
        GraphData.load_partition(tmp_path / "metis_2", 0, 2)
    with pytest.raises(FileNotFoundError, match="expected a part from 0 to 1, found 2"):
        GraphData.load_partition(tmp_path, 2, 2)


def test_checksum_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GraphData.from_pyg_data(directed_graph()).partition_graph(tmp_path, 2)
    from partpar.partition import load

    reads: list[Path] = []
    monkeypatch.setattr(load, "file_digest", lambda path: reads.append(path) or file_digest(path))
    for _ in range(2):
        GraphData.load_partition(tmp_path, 0, 2)
    assert len(reads) == 1
    GraphData.load_partition(tmp_path, 0, 2, verify=True)
    GraphData.load_partition(tmp_path, 1, 2, verify=False)
    assert len(reads) == 2
