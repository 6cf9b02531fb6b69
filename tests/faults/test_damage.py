r"""Files that were damaged, or made to do harm: what is read from them is what was written, or an error of ours."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import directed_graph

from partpar import GraphData
from partpar.datasets import from_npz
from partpar.errors import DamagedCheckpointError, PartparError
from partpar.graph.collection import GraphCollection
from partpar.partition.digest import file_digest
from partpar.training import Checkpointer

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("fresh_stamps")]

TRIALS = 200
FOLDER = "random_2"
Edit = Callable[[bytes, random.Random], bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    GraphData.from_pyg_data(directed_graph()).partition_graph(root, 2, algorithm="random")
    return root


def read_all(root: Path) -> list[dict[str, torch.Tensor]]:
    r"""Everything that both shares hold."""
    read = []
    for part in range(2):
        share = GraphData.load_partition(root, part, 2, algorithm="random")
        columns = {f"{side} {n}": t for side in ("dst", "src") for n, t in share.node(side=side).items()}
        columns |= {f"edge {n}": t for n, t in share.edge().items()}
        columns |= dict(zip(("indptr", "indices"), share.csc(), strict=True))
        read.append(columns)
    return read


def flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


@pytest.mark.timed("200 damaged shares or manifests")
@pytest.mark.parametrize("name", ["000.safetensors", "manifest.json"])
@pytest.mark.parametrize("edit", [flip, truncate], ids=["flips", "truncations"])
def test_damaged_bytes_are_never_taken_for_whole(name: str, edit: Edit, whole: Path, tmp_path: Path) -> None:
    r"""Shares: all of their bytes are under checksums. The manifest is not, but says so little that is free: a flipped
    byte of it is refused, or changes nothing that is read."""
    root = shutil.copytree(whole, tmp_path / "copy")
    path, draw = root / FOLDER / name, random.Random(0)
    data, expected = path.read_bytes(), read_all(whole)
    accepted, refused = [], 0
    for trial in range(TRIALS):
        path.write_bytes(edit(data, draw))
        if path.read_bytes() == data:
            continue
        try:
            found = read_all(root)
        except PartparError:
            refused += 1
            continue
        same = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(found, expected, strict=True))
        if name != "manifest.json" or not (same or edit is flip):
            accepted.append(trial)
        elif not same:
            accepted += [] if _only_renamed(found, expected) else [trial]
    assert not accepted, f"{len(accepted)} of {TRIALS} damaged files were read, the first in trial {accepted[0]}"
    assert refused >= (TRIALS // 4 if name == "manifest.json" else TRIALS - 1)


def _only_renamed(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> bool:
    r"""Whether what was read are the rows that were written, be it under another name: names stand in the manifest too."""
    values = [[list(map(_bytes, columns.values())) for columns in parts] for parts in (found, expected)]
    return sorted(values[0][0]) == sorted(values[1][0]) and sorted(values[0][1]) == sorted(values[1][1])


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


class Kept:
    r"""A training's state."""

    def __init__(self) -> None:
        self.tensors = {"weight": torch.arange(12.0).view(3, 4), "steps": torch.arange(5)}

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, "lr": 0.1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = {name: state[name] for name in self.tensors}


@pytest.mark.timed("200 damaged checkpoints")
@pytest.mark.parametrize("name", ["checkpoint.json", "SHA256SUMS", "000.safetensors"])
@pytest.mark.parametrize("edit", [flip, truncate], ids=["flips", "truncations"])
def test_a_damaged_checkpoint_is_never_taken_for_whole(name: str, edit: Edit, tmp_path: Path) -> None:
    r"""All bytes of a checkpoint are under checksums, and those of the checksums are compared with what they must be."""
    with Checkpointer(tmp_path, {"kept": Kept()}) as checkpoints:
        checkpoints.save(1, loss=0.5)
    path, draw = tmp_path / "step_0000000001" / name, random.Random(0)
    data = path.read_bytes()
    for _ in range(TRIALS):
        path.write_bytes(edit(data, draw))
        with Checkpointer(tmp_path, {"kept": Kept()}, resume=True) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DamagedCheckpointError):
                checkpoints.resume()
    path.write_bytes(data)
    with Checkpointer(tmp_path, {"kept": Kept()}, resume=True) as checkpoints:
        assert checkpoints.resume() == {"loss": 0.5}


# --- files made to do harm -------------------------------------------------------------------------------------------


class Canary:
    r"""Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / FOLDER / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def resigned(root: Path) -> None:
    r"""Gives the manifest the size and checksum of the share that stands there: damage would be found by these."""
    share = root / FOLDER / "000.safetensors"
    facts = {"num_bytes": share.stat().st_size, "sha256": file_digest(share)}
    edit_manifest(root, lambda raw: raw["shares"][0].update(facts))


@pytest.mark.timed("a pickle as share or manifest")
@pytest.mark.parametrize("name", ["000.safetensors", "manifest.json"])
def test_a_pickle_is_not_unpickled(name: str, whole: Path, tmp_path: Path) -> None:
    root, canary = shutil.copytree(whole, tmp_path / "copy"), tmp_path / "canary"
    (root / FOLDER / name).write_bytes(pickle.dumps(Canary(canary)))
    if name != "manifest.json":
        resigned(root)
    with pytest.raises(PartparError):
        read_all(root)
    assert not canary.exists()
    pickle.loads((root / FOLDER / name).read_bytes())  # so that the canary is one
    assert canary.exists()


@pytest.mark.timed("a manifest that leads out of its folder")
@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd", "..", "a/../000.safetensors", "", ".", "\0"])
def test_a_manifest_does_not_lead_out_of_its_folder(name: str, whole: Path, tmp_path: Path) -> None:
    root = shutil.copytree(whole, tmp_path / "copy")
    shutil.copy(root / FOLDER / "000.safetensors", tmp_path / "outside.safetensors")
    edit_manifest(root, lambda raw: raw["shares"][0].update(name=name))
    with pytest.raises(PartparError):
        read_all(root)


@pytest.mark.timed("a link as share, manifest or partition")
def test_a_link_as_share_is_refused(whole: Path, tmp_path: Path) -> None:
    root = shutil.copytree(whole, tmp_path / "copy")
    share = root / FOLDER / "000.safetensors"
    share.rename(tmp_path / "outside")
    share.symlink_to(tmp_path / "outside")
    with pytest.raises(PartparError, match="found a link"):
        read_all(root)


@pytest.mark.timed("a link as share, manifest or partition")
def test_a_link_as_partition_is_refused(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / FOLDER).symlink_to(whole / FOLDER, target_is_directory=True)
    with pytest.raises(PartparError, match="found a link"):
        read_all(root)
    shutil.copytree(whole / FOLDER, root / "random_3")
    (root / "random_3" / "manifest.json").unlink()
    (root / "random_3" / "manifest.json").symlink_to(whole / FOLDER / "manifest.json")
    with pytest.raises(PartparError, match="found a link"):
        GraphData.load_partition(root, 0, 3, algorithm="random")


def test_the_header_of_a_share_is_bounded(whole: Path, tmp_path: Path) -> None:
    root = shutil.copytree(whole, tmp_path / "copy")
    header = b'{"a":' + b"[" * (17 << 20)
    (root / FOLDER / "000.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    resigned(root)
    with pytest.raises(PartparError, match="header of at most"):
        read_all(root)


def bomb(path: Path, header: dict[str, Any] | None = None) -> None:
    r"""An archive whose arrays are zeros, or whose header promises what is not there."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("src", "dst", "x"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                facts = {"descr": "<i8", "fortran_order": False, "shape": (1 << 27,)}
                np.lib.format.write_array_header_1_0(stream, {**facts, **(header or {})})
                for _ in range(1 if header else 256):
                    stream.write(bytes(1 << 20))


@pytest.mark.timed("a zip bomb")
@pytest.mark.parametrize("read", [from_npz, GraphCollection.from_npz], ids=["graph", "collection"])
@pytest.mark.parametrize("header", [None, {"shape": (1 << 44,)}], ids=["zeros", "promises"])
def test_a_zip_bomb_is_not_unpacked(read: Callable, header: dict[str, Any] | None, tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    bomb(path, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PartparError, match=r"times its size|says that it holds"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path, draw = tmp_path / "graph.npz", random.Random(0)
    edges = np.arange(40, dtype=np.int64)
    np.savez_compressed(path, src=edges, dst=edges[::-1].copy(), x=np.ones((40, 3), np.float32))
    data = path.read_bytes()
    for edit in (flip, truncate):
        for _ in range(TRIALS // 2):
            path.write_bytes(edit(data, draw))
            try:
                from_npz(path)
            except PartparError:
                continue
