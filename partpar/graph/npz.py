r"""Reading ``.npz`` archives that may come from anywhere."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from partpar.errors import PartparError

# A file of zeros shrinks a thousandfold, a graph a few times. Small archives may be as empty as they like.
_MAX_RATIO = 200
_FREE_BYTES = 64 << 20
_MAX_HEADER = 1 << 16


def read_npz(
    path: str | Path, error: type[PartparError], names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    r"""Reads the arrays of an archive; objects, which would have to be unpickled, are refused. What it would take is
    added up before anything is unpacked.

    Args:
        path: The file.
        error: What to raise.
        names: Of the arrays wanted; by default all.

    Raises:
        PartparError: As :obj:`error`, if it is no archive of plain arrays, is damaged, or would unpack to more than 64 MiB
            and 200 times its size.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise error(f"{path}: expected an .npz archive of arrays, found a single array")
            assert file.zip is not None
            _check_sizes(path, file.zip)
            return {name: file[name] for name in file.files if names is None or name in names}
    except (ValueError, OSError, AttributeError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as found:
        if isinstance(found, error):
            raise
        raise error(f"{path}: expected an .npz archive of plain arrays, found something else: {found}") from found


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    members, size = archive.infolist(), path.stat().st_size
    total = sum(member.file_size for member in members)
    if total > max(_FREE_BYTES, _MAX_RATIO * size):
        raise ValueError(f"arrays of {total} bytes in a file of {size}, more than {_MAX_RATIO} times its size; save them uncompressed")
    for member in members:  # numpy would make room for what a header asks before it reads that
        if not member.filename.endswith(".npy"):
            continue
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream, max_header_size=_MAX_HEADER)
            needed = math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and needed > member.file_size:
                raise ValueError(f"{member.filename} of {member.file_size} bytes says that it holds {needed}")
