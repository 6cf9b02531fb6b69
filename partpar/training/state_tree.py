r"""States as two pieces: their tensors by name, and the rest as JSON that says where each tensor belongs.

A state is what ``state_dict()`` returns: dictionaries, lists and tuples of tensors and plain values. Nothing else can be
kept, so that nothing needs a pickle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from partpar.errors import CheckpointError, DamagedCheckpointError


def split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    r"""What JSON can carry of a state; its tensors go into :obj:`tensors`.

    Args:
        value: The state.
        name: Its own; those of its tensors begin with it.
        tensors: To be filled.

    Returns:
        ``{"tensor": name}`` in place of a tensor, ``{"dict": [[key, value], …]}`` of a dictionary, since JSON knows
        no keys but strings, ``{"tuple": […]}`` of a tuple, and plain values and lists as they are.

    Raises:
        CheckpointError: There is something else in it; the message says where.
    """
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"expected one tensor of the name {name!r}, found two; rename a key")
        tensors[name] = value
        return {"tensor": name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return split(value.item(), name, tensors)
    if isinstance(value, Mapping):
        strange = [key for key in value if type(key) not in (str, int)]
        if strange:
            raise CheckpointError(f"{name}: expected strings and integers as keys, found {strange[0]!r}")
        pairs = [[key, split(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [split(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise CheckpointError(
        f"{name}: expected tensors, numbers, strings, and dictionaries, lists and tuples of these, found "
        f"{type(value).__name__}; give an object whose state_dict() has nothing else"
    )


def join(raw: Any, tensors: Mapping[str, Tensor]) -> Any:
    r"""The state that was split into :obj:`raw` and :obj:`tensors`.

    Raises:
        DamagedCheckpointError: It is not what :func:`split` gives.
    """
    if raw is None or isinstance(raw, (bool, int, float, str)):
        return raw
    if isinstance(raw, list):
        return [join(item, tensors) for item in raw]
    if isinstance(raw, dict) and len(raw) == 1:
        ((kind, inner),) = raw.items()
        if kind == "tensor" and isinstance(inner, str) and inner in tensors:
            return tensors[inner]
        if kind == "tuple" and isinstance(inner, list):
            return tuple(join(item, tensors) for item in inner)
        if kind in ("dict", "counter") and isinstance(inner, list) and all(_is_pair(item) for item in inner):
            found = {key: join(item, tensors) for key, item in inner}
            return Counter(found) if kind == "counter" else found
    raise DamagedCheckpointError(f"expected a state as a checkpoint keeps it, found {str(raw)[:60]!r}")


def tensors_of(raw: Any) -> set[str]:
    r"""The names of a split state's tensors."""
    if isinstance(raw, list):
        return set[str]().union(*map(tensors_of, raw))
    if isinstance(raw, dict):
        if set(raw) == {"tensor"} and isinstance(raw["tensor"], str):
            return {raw["tensor"]}
        return set[str]().union(*map(tensors_of, raw.values()))
    return set()


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)
