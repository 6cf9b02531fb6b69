r"""Batch normalisation over the nodes of the whole graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg_nn
from torch import Tensor
from torch.distributed import ProcessGroup

from partpar import exchange
from partpar.hetero_route import HeteroRoute
from partpar.nn import rows
from partpar.nn.recompute import recomputing
from partpar.route import Route


class SyncBatchNorm(torch.nn.BatchNorm1d):
    r"""Batch normalisation (`Ioffe & Szegedy, 2015 <https://arxiv.org/abs/1502.03167>`_) with the statistics
    of all rows on all ranks.

    Arguments, ``state_dict`` and running statistics (with Bessel's correction) are those of
    :class:`torch.nn.BatchNorm1d`. Each rank takes the moments of its rows about their own mean, and those of
    all ranks are combined in float64 (Chan, Golub & LeVeque, "Algorithms for computing the sample variance",
    The American Statistician 1983): one small reduction forwards, one backwards. A route that is alone, or
    :obj:`None`, makes it :class:`torch.nn.BatchNorm1d` itself.

    Shapes:
        - **inputs:** owned rows :math:`(N_{owned}, F)`
        - **outputs:** :math:`(N_{owned}, F)`
    """

    def forward(self, input: Tensor, route: Route | HeteroRoute | None = None) -> Tensor:
        r"""Normalises owned rows (collective in training mode).

        Args:
            input (torch.Tensor): The rows of the owned nodes; a rank may have none.
            route (Route, optional): The share's route; :obj:`None` when one process owns everything.

        Raises:
            ValueError: The shape does not fit, or all ranks together have only one row to train on (on every
                rank).
        """
        if input.dim() != 2 or input.size(1) != self.num_features:
            raise ValueError(
                f"SyncBatchNorm: expected rows of shape (N, {self.num_features}), found {tuple(input.shape)}"
            )
        over_rows = self.training or (self.running_mean is None and self.running_var is None)
        if route is None or route.group is None or not over_rows:
            if over_rows and recomputing():  # as before, but running statistics have been updated already
                mean, var = (s if s is None else s.clone() for s in (self.running_mean, self.running_var))
                return F.batch_norm(input, mean, var, self.weight, self.bias, True, 0.0, self.eps)
            return super().forward(input)

        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mean, var, count = _moments(x.detach(), route)
        self._track(mean, var, count)
        out, _ = _Normalise.apply(x, mean, var, count, self.eps, route.group)
        if self.weight is None:
            return out.to(input.dtype, copy=True)  # the caller's own, to be changed in place
        return torch.addcmul(self.bias, out, self.weight).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        if not self.training or self.running_mean is None or self.running_var is None or recomputing():
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), momentum)


class _Normalise(torch.autograd.Function):
    r"""Rows less the mean of all ranks' rows, over their deviation; and the inverse of that deviation.

    The backward pass uses nothing but these two outputs, so it may itself be differentiated, any number of times.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, count: int, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        # In two steps, as the mean itself may not be a number of the rows' dtype.
        near = mean.to(x.dtype)
        inverse = (var + eps).rsqrt().to(x.dtype)
        out = (x - near).sub_((mean - near).to(x.dtype)).mul_(inverse)
        ctx.count, ctx.group = count, group
        ctx.save_for_backward(out, inverse)
        return out, inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_inverse: Tensor) -> tuple[Tensor | None, ...]:
        out, inverse = ctx.saved_tensors
        sums = torch.stack([grad.sum(0), (grad * out).sum(0) + grad_inverse * inverse])
        of_mean, of_deviation = (exchange.all_reduce_sum(sums, ctx.group) / ctx.count).unbind()
        return (grad - torch.addcmul(of_mean, out, of_deviation)) * inverse, None, None, None, None, None


def _moments(x: Tensor, route: Route | HeteroRoute) -> tuple[Tensor, Tensor, int]:
    r"""Mean and variance over the rows of all ranks, in float64, and their number (collective)."""
    # Each rank's rows about their own mean, then the means of all ranks about theirs: numbers stay small.
    centre = x.sum(0) / max(x.size(0), 1)
    x = x - centre
    own = torch.stack([x.sum(0), x.square().sum(0), centre, torch.full_like(centre, x.size(0))]).double()
    sums, squares, centres, counts = exchange.all_gather(own, route.group).unbind(1)  # [ranks, F] each
    count = int(counts[:, 0].sum())
    if count <= 1:  # as torch says it
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{torch.Size([count, x.size(1)])}"
        )
    middle = (counts * centres).sum(0) / count
    away = centres - middle
    shift = (sums + counts * away).sum(0) / count  # the mean less the middle
    var = (squares + 2 * away * sums + counts * away.square()).sum(0) / count - shift.square()
    return middle + shift, var, count


class BatchNorm(pyg_nn.BatchNorm):
    r"""The face that PyG gives to :class:`SyncBatchNorm`: arguments and ``state_dict`` are those of
    :class:`torch_geometric.nn.BatchNorm`, which keeps the norm in ``module``. Models use it for
    ``norm="batch_norm"``, so that their weights and PyG's move both ways.
    """

    def __init__(
        self,
        in_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        allow_single_element: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            in_channels, eps, momentum, affine, track_running_stats, allow_single_element, device
        )
        self.module = SyncBatchNorm(in_channels, eps, momentum, affine, track_running_stats, device=device)

    def forward(self, x: Tensor, route: Route | HeteroRoute | None = None) -> Tensor:
        r"""Normalises owned rows; see :meth:`SyncBatchNorm.forward`."""
        if self.allow_single_element and self.training:
            count = torch.tensor(x.size(0), device=x.device)
            if int(exchange.all_reduce_sum(count, None if route is None else route.group)) <= 1:
                norm = self.module
                return F.batch_norm(
                    x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
                )
        return self.module(x, route)


def with_global_statistics(norm: torch.nn.Module, where: str) -> torch.nn.Module:
    r"""The partition-parallel counterpart of a norm: batch norms become :class:`SyncBatchNorm`, what works
    row by row stays.

    Raises:
        ValueError: There is none; :obj:`where` begins the message.
    """
    if rows.takes_route(norm):
        return norm
    made: torch.nn.Module
    if type(norm) is pyg_nn.BatchNorm:
        inner: Any = norm.module
        shared = {key: getattr(inner, key) for key in ("eps", "momentum", "affine", "track_running_stats")}
        made = BatchNorm(inner.num_features, **shared, allow_single_element=bool(norm.allow_single_element))
    elif type(norm) is torch.nn.BatchNorm1d:
        made = SyncBatchNorm(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
    else:
        rows.refuse_over_all_rows(norm, where)
        return norm
    reference = next(iter(norm.state_dict().values()), None)
    if reference is not None:
        made.to(reference.device, reference.dtype)
    made.load_state_dict(norm.state_dict())
    return made.train(norm.training)
