r"""The weights of the best epoch so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BestWeights:
    r"""A copy of a module's state, to come back to.

    Args:
        module: Whose.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self._copy = module, dict[str, Tensor]()

    def keep(self) -> None:
        r"""Copies the state as it is now."""
        self._copy = {name: value.detach().clone() for name, value in self._module.state_dict().items()}

    def put_back(self) -> None:
        r"""Gives the module the state that was kept last, if there is one."""
        if self._copy:
            self._module.load_state_dict(self._copy)

    def state_dict(self) -> dict[str, Tensor]:
        return self._copy

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._copy = dict(state)
