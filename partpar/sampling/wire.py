r"""Messages between processes of this machine: names and numbers as JSON, then the raw bytes of each tensor.

Nothing is unpickled, and no room is made for what has not come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from partpar.errors import ServiceError
from partpar.serving.transport import Tensors, Values, check_message

_MAX_HEAD = 1 << 22  # bytes
_MAX_DIM = 8
# Others, such as quantised ones, are no numbers without more than their bytes: torch would crash on them.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}  # fmt: skip


def send(connection: Connection, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    r"""Sends one message; of tensors, those of real or complex numbers."""
    columns = {name: tensor.contiguous() for name, tensor in tensors.items()}
    kinds = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in columns.items()]
    connection.send_bytes(json.dumps([kinds, dict(values)]).encode())
    for tensor in columns.values():
        if tensor.nbytes:
            connection.send_bytes(tensor.view(-1).view(torch.uint8).numpy().data)


def receive(connection: Connection) -> tuple[Tensors, Values]:
    r"""Receives one message.

    Raises:
        EOFError, OSError: The other side has gone.
        ServiceError: What came is no message; where the next one would begin is not known.
    """
    head = _bytes(connection, _MAX_HEAD)
    try:
        kinds, values = json.loads(head)
        columns = [_column(*kind) for kind in kinds]
    except (ValueError, TypeError, RecursionError) as error:
        raise ServiceError(f"expected names, kinds and plain values as JSON, found {head[:100]!r}") from error
    check_message({}, values)
    tensors = {}
    for name, dtype, shape in columns:
        size = math.prod(shape) * dtype.itemsize
        found = _bytes(connection, size) if size else b""
        if len(found) != size:
            raise ServiceError(f"{name!r}: expected {size} bytes of {dtype} {shape}, found {len(found)}")
        # A copy, for what was received may not be written to.
        flat = torch.frombuffer(bytearray(found), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(shape)
    return tensors, values


def _bytes(connection: Connection, most: int) -> bytes:
    try:
        return connection.recv_bytes(most)
    except OSError as error:
        if "bad message length" in str(error):
            raise ServiceError(f"expected at most {most} bytes, found more") from error
        raise
    except MemoryError as error:
        raise ServiceError(f"expected a message that there is room for, found one of {most} bytes") from error


def _column(name: Any, dtype: Any, shape: Any) -> tuple[str, torch.dtype, list[int]]:
    """What a head says of a tensor; raises a ValueError where that is no tensor."""
    kind = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    whole = isinstance(shape, list) and len(shape) <= _MAX_DIM and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    if not isinstance(name, str) or kind is None or not whole or math.prod(n or 1 for n in shape) >= 1 << 56:
        raise ValueError("no tensor")
    return name, kind, shape
