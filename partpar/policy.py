r"""What a route may do to rows on their way. The neutral policy does nothing, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partpar.errors import RouteError

_WIRE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Policy:
    r"""An approximation that training opted into. It is off wherever gradients are (``torch.no_grad()``), hence in
    evaluation.

    Args:
        wire_dtype: Rows of a wider floating dtype are rounded to this one on the wire, forwards and backwards; the
            error of an entry is at most half a unit in the last place of it: ``2**-9`` of its size for bfloat16.
    """

    wire_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.wire_dtype is not None and self.wire_dtype not in _WIRE:
            raise RouteError(
                f"wire_dtype: expected one of {', '.join(map(str, _WIRE))} or None, found {self.wire_dtype}"
            )

    @property
    def code(self) -> int:
        r"""The policy as a number, for ranks to compare."""
        return 0 if self.wire_dtype is None else 1 + _WIRE.index(self.wire_dtype)
