r"""The mean of a loss over the labelled rows of the whole graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import agreement, exchange
from partpar.hetero_route import HeteroRoute
from partpar.route import Route


def global_mean(
    loss_per_row: Tensor,
    mask: Tensor | None = None,
    route: Route | HeteroRoute | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Averages over all rows of all ranks, so that uneven parts weigh right (collective).

    .. code-block:: python

        loss = global_mean(F.cross_entropy(out, y, reduction="none"), share.node("dst")["train_mask"])

    The value is the global mean, the same on every rank. The gradient is ``world_size`` times this rank's
    part of the global mean's, so that the average over ranks which
    :class:`~torch.nn.parallel.DistributedDataParallel` takes is the gradient of one process that holds all
    rows. A rank without labelled rows contributes 0 and stays connected to its graph, so that its backward
    pass meets the others'.

    Args:
        loss_per_row: ``[num_owned, *]`` floating, as by ``reduction="none"``.
        mask: ``[num_owned]`` bool, the rows to count; what stands in the others, NaN included, is not looked
            at.
        route: The share's route; the mean is taken over the ranks of its group.
        group: The ranks to take the mean over when there is no route: by default all, or this process alone
            where torch.distributed is not initialised.

    Returns:
        A scalar of the dtype of :obj:`loss_per_row`; sums are taken in float64.

    Raises:
        ValueError: Shapes or dtypes do not fit, or no rank has a row to count (on every rank).
        AgreementError: Ranks made different exchanges since they were set up, such as one fewer; on every rank.
    """
    if not loss_per_row.is_floating_point() or loss_per_row.dim() == 0:
        raise ValueError(
            f"global_mean: expected one floating loss per row, found {loss_per_row.dtype} of shape "
            f"{tuple(loss_per_row.shape)}; compute it with reduction='none'"
        )
    if isinstance(mask, Route | HeteroRoute):
        raise ValueError(
            f"global_mean: expected a bool mask of rows, found a {type(mask).__name__} in its place; pass route=route"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != loss_per_row.shape[:1]):
        raise ValueError(
            f"global_mean: expected a bool mask of shape ({loss_per_row.size(0)},), found {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    if route is not None:
        group = route.group
    elif group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD

    rows = loss_per_row if mask is None else loss_per_row[mask]
    local = rows.sum(dtype=torch.float64)
    told = local.new_tensor([rows.numel(), *agreement.tally(group)], requires_grad=False)
    sums = exchange.all_reduce_sum(torch.cat([local.detach().view(1), told]), group)
    total, num_rows = sums[0], sums[1]
    _, count, *marks = sums.tolist()
    agreement.compare(group, marks)
    if int(count) == 0:
        where = "the mask is empty on every rank" if mask is not None else "every rank has 0 rows"
        raise ValueError(f"global_mean: expected at least one row to average over, found none: {where}")
    world_size = 1 if group is None else dist.get_world_size(group)
    mean: Tensor = _GlobalMean.apply(local, total / num_rows, world_size / num_rows)
    return mean.to(loss_per_row.dtype)


class _GlobalMean(torch.autograd.Function):
    """The value that all ranks agree on, with the gradient of this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None
