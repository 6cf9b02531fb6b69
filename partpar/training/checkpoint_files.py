r"""Checkpoints as folders: what makes one whole, which ones there are, and how one comes and goes at once.

.. code-block:: text

    checkpoints/
      step_0000000020/
        checkpoint.json      format version, step, world size, the state but for its tensors, where each tensor is
        000.safetensors      tensors that rank 0 wrote
        001.safetensors      …
        SHA256SUMS           the marker: a line for each file, as ``sha256sum -c`` reads it
      .lock                  held by the run that writes here

A checkpoint is written under a name that begins with a dot; the marker is its last file, and the rename to ``step_…`` its
last act. Whatever else is found was cut short, and goes when the next run begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from partpar.errors import CheckpointError, DamagedCheckpointError
from partpar.partition.digest import file_digest

FORMAT, FORMAT_VERSION = "partpar-checkpoint", 1
MANIFEST, MARKER, LOCK = "checkpoint.json", "SHA256SUMS", ".lock"
_NAME = re.compile(r"step_(\d{10,})")
_LEFT_OVER = re.compile(r"\.step_\d{10,}\.(partial|old)")
_FILE = re.compile(r"\d{3,}\.safetensors")
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.]+)")
_MOST_BYTES = 1 << 28  # of a manifest


@dataclass(frozen=True)
class Chunk:
    r"""A block of a tensor, and where it is kept: the tensor :obj:`key` of a file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Stored:
    r"""A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    r"""What ``checkpoint.json`` says.

    Args:
        step: Of the training.
        world_size: Workers that wrote it.
        state: For each object kept, its state as :func:`partpar.training.state_tree.split` has it.
        tensors: By name.
        files: Names of the files of tensors.
    """

    step: int
    world_size: int
    state: dict[str, Any]
    tensors: dict[str, Stored]
    files: tuple[str, ...]

    def to_json(self) -> str:
        tensors = {
            name: [str(t.dtype).removeprefix("torch."), t.shape, [[c.offsets, c.shape, c.file, c.key] for c in t.chunks]]
            for name, t in self.tensors.items()
        }
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": self.step, "world_size": self.world_size}
        return json.dumps({**head, "files": self.files, "tensors": tensors, "state": self.state}) + "\n"


# --- names ----------------------------------------------------------------------------------------------------------


def final_folder(root: Path, step: int) -> Path:
    r"""Where the whole checkpoint of a step stands."""
    return root / f"step_{step:010d}"


def partial_folder(root: Path, step: int) -> Path:
    r"""Where it is written."""
    return root / f".step_{step:010d}.partial"


def steps_in(root: Path) -> list[int]:
    r"""The steps that there are checkpoints of, ascending; whole ones, unless they were damaged since."""
    found = [_NAME.fullmatch(path.name) for path in root.iterdir() if not path.is_symlink() and path.is_dir()]
    return sorted(int(match[1]) for match in found if match is not None)


# --- coming and going -----------------------------------------------------------------------------------------------


def lock(root: Path) -> IO[str]:
    r"""Keeps other runs from writing here, until the file is closed or the process ends, however it does.

    Raises:
        CheckpointError: Another run is at it.
    """
    file = (root / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"{root}: expected a folder that no other run writes to, found one that does; wait for it, or choose another"
        ) from None
    except OSError:
        pass  # a file system without locks: then there is nothing to find out
    return file


def clean(root: Path) -> None:
    r"""Removes what killed runs left behind; to be called under the lock."""
    for path in root.iterdir():
        if _LEFT_OVER.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def publish(root: Path, manifest: Manifest, sums: dict[str, str]) -> None:
    r"""Completes a checkpoint whose files of tensors are written: manifest, marker, rename.

    Args:
        root: The folder of checkpoints.
        manifest: Of this one.
        sums: SHA-256 of each of its files of tensors.
    """
    partial, final = partial_folder(root, manifest.step), final_folder(root, manifest.step)
    text = manifest.to_json().encode()
    _write(partial / MANIFEST, text)
    sums = {MANIFEST: hashlib.sha256(text).hexdigest(), **sums}
    _write(partial / MARKER, _marker(sums).encode())
    sync(partial)
    if final.exists():  # one that was damaged, and come by again
        remove(root, manifest.step)
    os.rename(partial, final)
    sync(root)


def remove(root: Path, step: int) -> None:
    r"""Takes a checkpoint away; at no moment half of it stands under its name."""
    old = root / f".step_{step:010d}.old"
    shutil.rmtree(old, ignore_errors=True)
    os.rename(final_folder(root, step), old)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(root: Path, step: int) -> None:
    r"""Renames a damaged checkpoint, so that nobody looks at it again but who wants to."""
    final = final_folder(root, step)
    aside = final.with_name(f"{final.name}.damaged")
    with suppress(OSError):  # a folder that may only be read
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)


def sync(path: Path) -> None:
    r"""Has the system write a file or folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _marker(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


# --- reading --------------------------------------------------------------------------------------------------------


def open_checkpoint(root: Path, step: int, part: int = 0, num_parts: int = 1) -> Manifest:
    r"""Reads the manifest of a checkpoint, and compares files with their checksums.

    Args:
        root: The folder of checkpoints.
        step: Of which.
        part: Who asks: of ``num_parts`` workers each compares every ``num_parts``-th file of tensors.
        num_parts: See :obj:`part`.

    Raises:
        DamagedCheckpointError: A file is missing, no plain file, or not what its checksum says.
        CheckpointError: It is of a newer format.
    """
    folder = final_folder(root, step)
    try:
        sums = _read_marker(folder)
        text = _regular(folder / MANIFEST).read_bytes()
        if hashlib.sha256(text).hexdigest() != sums[MANIFEST]:
            raise DamagedCheckpointError(f"{folder / MANIFEST}: expected the checksum {sums[MANIFEST]}, found another")
        manifest = _parse(folder, text)
        if manifest.step != step or {MANIFEST, *manifest.files} != set(sums):
            raise DamagedCheckpointError(f"{folder}: expected step {step} and the files of {MARKER}, found others")
        for name in manifest.files[part::num_parts]:
            if file_digest(_regular(folder / name)) != sums[name]:
                raise DamagedCheckpointError(f"{folder / name}: expected the checksum {sums[name]}, found another")
    except OSError as error:
        raise DamagedCheckpointError(f"{folder}: expected a checkpoint that can be read, found {error}") from error
    return manifest


def _regular(path: Path) -> Path:
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise DamagedCheckpointError(f"{path}: expected a plain file, found a link or something else")
    if path.name in (MANIFEST, MARKER) and path.stat().st_size > _MOST_BYTES:
        raise DamagedCheckpointError(f"{path}: expected at most {_MOST_BYTES} bytes, found {path.stat().st_size}")
    return path


def _read_marker(folder: Path) -> dict[str, str]:
    text = _regular(folder / MARKER).read_bytes().decode("ascii", "replace")
    lines = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    sums = {match[2]: match[1] for match in lines if match is not None}
    if MANIFEST not in sums or text != _marker(sums):
        raise DamagedCheckpointError(f"{folder / MARKER}: expected a line with the checksum of each file, found others")
    return sums


def _parse(folder: Path, text: bytes) -> Manifest:
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT or type(raw["format_version"]) is not int:
            raise ValueError(f"format {raw['format']!r}")
        if raw["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: expected format version {FORMAT_VERSION} or before, found {raw['format_version']}; upgrade partpar"
            )
        files = tuple(raw["files"])
        if not all(_FILE.fullmatch(name) for name in files):
            raise ValueError(f"files {files[:8]}")
        tensors = {
            str(name): _stored(dtype, shape, chunks, files)
            for name, (dtype, shape, chunks) in raw["tensors"].items()
        }
        held = sum(t.dtype.itemsize * torch.Size(t.shape).numel() for t in tensors.values())
        if held > sum(_regular(folder / name).stat().st_size for name in files):
            raise ValueError("tensors that are larger than the files")
        state = raw["state"]
        if not isinstance(state, dict):
            raise TypeError("no state")
        return Manifest(_count(raw["step"]), _count(raw["world_size"]), state, tensors, files)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{folder / MANIFEST}: expected the manifest of a checkpoint, found {type(error).__name__}: {error}"
        ) from error


def _stored(dtype: str, shape: Sequence[int], chunks: Sequence[Any], files: tuple[str, ...]) -> Stored:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype {dtype!r}")
    read = tuple(Chunk(_counts(o), _counts(s), files[files.index(f)], str(key)) for o, s, f, key in chunks)
    whole = _counts(shape)
    inside = all(
        len(c.offsets) == len(c.shape) == len(whole)
        and all(a + n <= most for a, n, most in zip(c.offsets, c.shape, whole, strict=True))
        for c in read
    )
    if not inside or sum(torch.Size(c.shape).numel() for c in read) != torch.Size(whole).numel():
        raise ValueError(f"chunks that do not fill a tensor of shape {whole}")
    return Stored(kind, whole, read)


def _counts(raw: Sequence[int]) -> tuple[int, ...]:
    return tuple(_count(n) for n in raw)


def _count(raw: Any) -> int:
    if type(raw) is not int or not 0 <= raw < 2**62:
        raise ValueError(f"expected a count, found {raw!r}")
    return raw
