r"""Aggregation of source rows over the in-edges of each destination.

Every function takes an :class:`~partpar.kernels.adjacency.Adjacency` and source rows ``[num_src, C]`` or
``[num_src, H, C]``, returns destination rows ``[num_dst, C]`` or ``[num_dst, H, C]``, and is zero for a
destination without in-edges. None makes a message per edge, forward or backward, on the CPU. 16-bit rows are
accumulated in float32. Sums can be differentiated any number of times; the others once, and say so when asked
for more.
"""

import torch
from torch import Tensor

from partpar.errors import GraphError
from partpar.kernels.adjacency import Adjacency
from partpar.kernels.extrema import extreme
from partpar.kernels.linear import add_weighted_sum, sum_and_head, weighted_sum
from partpar.kernels.softmax import attend

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def aggregate_sum(
    adj: Adjacency, x: Tensor, weight: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    r"""The sum over in-edges, weighted if :obj:`weight` is given.

    Args:
        adj (Adjacency): The edges.
        x (Tensor): ``[num_src, C]`` or ``[num_src, H, C]``.
        weight (Tensor, optional): ``[E]``, in the adjacency's order of edges; ``[E, H]`` if :obj:`x` has
            heads. Its gradient is computed only if it requires one. (default: :obj:`None`)
        out (Tensor, optional): Rows to add to, in place: the interior, say, when :obj:`adj` and :obj:`x` are
            the halo's. Differentiable as well. (default: :obj:`None`)

    Returns:
        Tensor ``[num_dst, C]`` or ``[num_dst, H, C]``.

    Raises:
        GraphError: If a shape, dtype or device does not fit.
    """
    rows, weight = _rows(adj, x, weight)
    if out is None:
        return weighted_sum(adj, rows, weight)
    shape = (adj.num_dst, *x.shape[1:])
    if out.shape != shape or out.dtype != rows.dtype or out.device != x.device:
        raise GraphError(
            f"Expected `out` of {rows.dtype} {list(shape)} on {x.device}, found {out.dtype} "
            f"{list(out.shape)} on {out.device}."
        )
    if not out.is_contiguous():
        raise GraphError(
            f"Expected a contiguous `out`, found strides {out.stride()}. Use `out.contiguous()`."
        )
    return add_weighted_sum(adj, rows, weight, out)


def aggregate_sum_and_head(adj: Adjacency, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""The sum over in-edges, and the rows of the destinations, where these are the first sources: of a sampled block.

    Args:
        adj (Adjacency): The edges, of no more destinations than sources.
        x (Tensor): ``[num_src, C]`` or ``[num_src, H, C]``.

    Returns:
        Two tensors ``[num_dst, C]`` or ``[num_dst, H, C]``.

    Raises:
        GraphError: If a shape, dtype or device does not fit.
    """
    rows, _ = _rows(adj, x, None)
    return sum_and_head(adj, rows)


def aggregate_mean(adj: Adjacency, x: Tensor) -> Tensor:
    r"""The mean over in-edges. Shapes and errors as for :func:`aggregate_sum`."""
    return aggregate_sum(adj, x, adj.mean_weight(x.dtype))


def aggregate_max(adj: Adjacency, x: Tensor) -> Tensor:
    r"""The largest entry over in-edges, per column; a gradient is split evenly over all tied entries.

    Shapes and errors as for :func:`aggregate_sum`. NaN if any entry is.
    """
    rows, _ = _rows(adj, x, None)
    return extreme(adj, rows, largest=True)


def aggregate_min(adj: Adjacency, x: Tensor) -> Tensor:
    r"""The smallest entry over in-edges, as :func:`aggregate_max`."""
    rows, _ = _rows(adj, x, None)
    return extreme(adj, rows, largest=False)


def aggregate_softmax(adj: Adjacency, x: Tensor, logits: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""The sum over in-edges, weighted by the softmax of :obj:`logits` over each destination's in-edges.

    Args:
        adj (Adjacency): The edges.
        x (Tensor): ``[num_src, H, C]``.
        logits (Tensor): ``[E, H]``.
        scale (Tensor, optional): ``[E, H]`` or ``[E]``, multiplied to the softmax: a dropout mask. It is a
            constant. (default: :obj:`None`)

    Returns:
        Tensor ``[num_dst, H, C]``.

    Raises:
        GraphError: If a shape, dtype or device does not fit.
    """
    return _attend(adj, x, None, None, logits, 1.0, scale)


def aggregate_gat(
    adj: Adjacency,
    x: Tensor,
    a_src: Tensor,
    a_dst: Tensor,
    a_edge: Tensor | None = None,
    negative_slope: float = 0.2,
    scale: Tensor | None = None,
) -> Tensor:
    r"""The attention of GAT (Velickovic et al., "Graph Attention Networks", 2018): as
    :func:`aggregate_softmax` with the logits ``leaky_relu(a_src[src] + a_dst[dst] + a_edge)``, which are
    never stored.

    Args:
        adj (Adjacency): The edges.
        x (Tensor): ``[num_src, H, C]``.
        a_src (Tensor): ``[num_src, H]``.
        a_dst (Tensor): ``[num_dst, H]``.
        a_edge (Tensor, optional): ``[E, H]``. (default: :obj:`None`)
        negative_slope (float, optional): Of the ``leaky_relu``. (default: :obj:`0.2`)
        scale (Tensor, optional): ``[E, H]`` or ``[E]``, multiplied to the softmax: a dropout mask. It is a
            constant. (default: :obj:`None`)

    Returns:
        Tensor ``[num_dst, H, C]``.

    Raises:
        GraphError: If a shape, dtype or device does not fit.
    """
    return _attend(adj, x, a_src, a_dst, a_edge, negative_slope, scale)


def _rows(adj: Adjacency, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    r"""Checks, and makes the rows contiguous and the weight ``[E, H or 1]``, both of one dtype."""
    if x.dim() not in (2, 3) or x.size(0) != adj.num_src:
        raise GraphError(
            f"Expected rows of shape [{adj.num_src}, C] or [{adj.num_src}, H, C], one for each source, "
            f"found {list(x.shape)}."
        )
    if x.dtype not in FLOATS or x.device != adj.device:
        raise GraphError(
            f"Expected rows of a floating-point dtype on {adj.device}, where the adjacency is, found "
            f"{x.dtype} on {x.device}."
        )
    heads = x.size(1) if x.dim() == 3 else 1
    if weight is None:
        return x.contiguous(), None
    _check_edges(adj, weight, heads, "weight", x)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    weight = weight.unsqueeze(1) if weight.dim() == 1 else weight
    return x.to(dtype).contiguous(), weight.to(dtype).contiguous()


def _check_edges(adj: Adjacency, values: Tensor, heads: int, name: str, x: Tensor) -> None:
    if tuple(values.shape) not in ((adj.num_edges,), (adj.num_edges, 1), (adj.num_edges, heads)):
        raise GraphError(
            f"Expected `{name}` of shape [{adj.num_edges}] or [{adj.num_edges}, {heads}], for each edge "
            f"and head, found {list(values.shape)}."
        )
    if not values.is_floating_point() or values.device != x.device:
        raise GraphError(
            f"Expected `{name}` of a floating-point dtype on {x.device}, found {values.dtype} on "
            f"{values.device}."
        )


def _attend(
    adj: Adjacency,
    x: Tensor,
    a_src: Tensor | None,
    a_dst: Tensor | None,
    a_edge: Tensor | None,
    slope: float,
    scale: Tensor | None,
) -> Tensor:
    rows, _ = _rows(adj, x, None)
    if x.dim() != 3:
        raise GraphError(f"Expected rows of shape [{adj.num_src}, H, C], found {list(x.shape)}.")
    heads = x.size(1)
    for name, values, count in (("a_src", a_src, adj.num_src), ("a_dst", a_dst, adj.num_dst)):
        if values is not None and tuple(values.shape) != (count, heads):
            raise GraphError(f"Expected `{name}` of shape [{count}, {heads}], found {list(values.shape)}.")
    if a_edge is not None:
        _check_edges(adj, a_edge, heads, "logits" if a_src is None else "a_edge", x)
        a_edge = (a_edge.unsqueeze(1) if a_edge.dim() == 1 else a_edge).expand(-1, heads)
    if scale is not None:
        _check_edges(adj, scale, heads, "scale", x)
        if scale.requires_grad:
            raise GraphError(
                "Expected a constant `scale`, found one that requires a gradient: it is a dropout mask. "
                "Use `scale.detach()`."
            )
        scale = (scale.unsqueeze(1) if scale.dim() == 1 else scale).expand(-1, heads)
    dtype = x.dtype
    for values in (a_src, a_dst, a_edge):
        dtype = dtype if values is None else torch.promote_types(dtype, values.dtype)
    parts = [
        None if values is None else values.to(dtype).contiguous()
        for values in (rows, a_src, a_dst, a_edge, scale)
    ]
    assert parts[0] is not None
    return attend(adj, parts[0], parts[1], parts[2], parts[3], slope, parts[4])
