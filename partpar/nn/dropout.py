r"""Dropout that does not depend on which worker a row is on."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from partpar.kernels import counter
from partpar.nn.recompute import step_of
from partpar.nn.rows import check_flow, check_owned_first
from partpar.route import Route

# Layers that are not given a number count on from here, out of the way of those that are.
_numbers = itertools.count(1 << 32)


class Dropout(torch.nn.Module):
    r"""Dropout (Srivastava et al., JMLR 2014) whose draws are a function of (seed, step, layer, raw id,
    column), so that any number of workers, and any partition, drops the same entries.

    Args:
        p (float, optional): The probability of an entry to be zeroed; the others are scaled by
            ``1 / (1 - p)``. (default: :obj:`0.5`)
        seed (int, optional): The seed of the run, the same on every rank. (default: :obj:`0`)
        layer (int, optional): What tells this layer's draws from those of others. :obj:`None` numbers layers
            in the order of their creation in this process, which must then be the same on every rank.
            (default: :obj:`None`)

    ``step`` counts the training passes and is part of the ``state_dict`` (unless ``p`` is 0, when nothing is
    drawn), so that a resumed run goes on where it stopped. Loading a ``state_dict`` without it, as plain PyG
    models write, leaves it as it is.

    Raises:
        ValueError: :obj:`p` is not in :math:`[0, 1]`.
    """

    step: Tensor

    def __init__(self, p: float = 0.5, seed: int = 0, layer: int | None = None) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: expected a probability in [0, 1], found {p}")
        self.p = float(p)
        self.seed = seed
        self.layer = next(_numbers) if layer is None else layer
        # No buffer: DistributedDataParallel would broadcast it before each pass, and ranks wait for each other.
        self.step = torch.zeros((), dtype=torch.int64)

    def reset_parameters(self) -> None:
        r"""Begins to count the steps anew."""
        self.step.zero_()

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        r"""Drops entries of owned rows.

        Args:
            x (torch.Tensor): ``[num_owned, *]``.
            route (Route, optional): The share's route, for the raw ids of rows; :obj:`None` when one process
                owns everything, and row ``i`` is that of raw id ``i``.
        """
        if not self.training or self.p == 0.0:
            return x
        check_owned_first(self, route)
        if route is not None and x.size(0) != route.num_owned:
            raise ValueError(
                f"Dropout: expected a row for each of the {route.num_owned} owned nodes, found shape "
                f"{tuple(x.shape)}"
            )
        ids = torch.arange(x.size(0), device=x.device) if route is None else route.raw_ids[: route.num_owned]
        return self._drop(x, ids)

    def drop_edges(self, x: Tensor, edge_index: Tensor, route: Route | None = None) -> Tensor:
        r"""Drops entries of rows that belong to edges, by the raw ids of both ends. Parallel edges share
        their draws.

        Args:
            x (torch.Tensor): ``[E, *]``.
            edge_index (torch.Tensor): ``[2, E]``, edges from sources to owned nodes.
            route (Route, optional): As for :meth:`forward`.
        """
        if not self.training or self.p == 0.0:
            return x
        check_owned_first(self, route)
        source, destination = (edge_index if route is None else route.raw_ids[edge_index]).unbind()
        return self.drop_pairs(x, source, destination)

    def drop_pairs(self, x: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        r"""Drops entries of rows that belong to pairs of nodes.

        Args:
            x (torch.Tensor): ``[E, *]``.
            source (torch.Tensor): ``[E]``, the raw ids of one end.
            destination (torch.Tensor): ``[E]``, those of the other.
        """
        if not self.training or self.p == 0.0:
            return x
        return self._drop(x, counter.pair_ids(source, destination))

    def _drop(self, x: Tensor, ids: Tensor) -> Tensor:
        columns = x.shape[1:].numel()
        dropped = counter.below(
            self.p, self.seed, step_of(self._advance), self.layer, ids.to(x.device), columns
        )
        scale = 0.0 if self.p == 1.0 else 1.0 / (1.0 - self.p)
        return (x * scale).masked_fill(dropped.view(x.shape), 0.0)

    def _advance(self) -> int:
        step = int(self.step)
        self.step += 1
        return step

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.p > 0.0:
            destination[prefix + "step"] = self.step

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        step = state_dict.pop(prefix + "step", None)
        if step is not None and self.p > 0.0:  # a run without dropout goes on with any
            self.step.copy_(step)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"p={self.p}, seed={self.seed}, layer={self.layer}"


class AttentionDropout:
    r"""Before a convolution of PyG with attention among the bases of its partition-parallel twin: dropout of the attention
    is then drawn by the raw ids of both ends.

    Args:
        *args (optional): Arguments of PyG's convolution.
        seed (int, optional): The seed of attention dropout. (default: :obj:`0`)
        layer (int, optional): The layer's number for attention dropout, see :class:`Dropout`. (default: :obj:`None`)
        **kwargs (optional): Arguments of PyG's convolution.

    Raises:
        ValueError: :obj:`flow` is not ``"source_to_target"``.
    """

    flow: str
    dropout: float

    def __init__(self, *args: Any, seed: int = 0, layer: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_flow(self, self.flow)
        self.attention_dropout = Dropout(self.dropout, seed, layer)
