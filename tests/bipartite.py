r"""Unkind bipartite graphs, and every aggregation in plain torch and PyG operations to compare with."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from partpar.kernels.adjacency import Adjacency

relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
PLAIN = ("sum", "mean", "max", "min")


@st.composite
def bipartite(draw: st.DrawFn, max_nodes: int = 7) -> tuple[Adjacency, torch.Generator]:
    num_src, num_dst = draw(st.integers(1, max_nodes)), draw(st.integers(0, max_nodes))
    end = st.tuples(st.integers(0, num_src - 1), st.integers(0, max(num_dst - 1, 0)))
    edges = draw(st.lists(end, max_size=20)) if num_dst else []
    edge_index = torch.tensor(edges, dtype=torch.int64).view(-1, 2).t()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return Adjacency.from_edge_index(edge_index, num_src, num_dst), generator


def large(num_src: int = 700, num_dst: int = 500, num_edges: int = 40_000, seed: int = 0) -> Adjacency:
    r"""Beyond the size that runs on one thread; half of all edges go into one hub, and some rows are
    empty.
    """
    generator = torch.Generator().manual_seed(seed)
    dst = torch.randint(3, num_dst, (num_edges,), generator=generator)
    dst[::2] = 7
    return Adjacency.from_edge_index(
        torch.stack([torch.randint(num_src, (num_edges,), generator=generator), dst]), num_src, num_dst
    )


def messages(adj: Adjacency, x: Tensor) -> Tensor:
    return x[adj.indices.long()]


def reference(adj: Adjacency, x: Tensor, op: str) -> Tensor:
    return scatter(messages(adj, x), adj.destinations.long(), 0, adj.num_dst, op)


def normal(
    *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    r"""Values, and the gradients of all inputs for one random direction."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    direction = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        ours.dtype
    )
    grads = torch.autograd.grad(ours, inputs, direction, retain_graph=True)
    expected = torch.autograd.grad(theirs, inputs, direction, retain_graph=True, allow_unused=True)
    for grad, other in zip(grads, expected, strict=True):
        other = torch.zeros_like(grad) if other is None else other
        scale = tolerance * max(1.0, float(other.abs().max()) if other.numel() else 1.0)
        torch.testing.assert_close(grad, other, rtol=tolerance, atol=scale)


def reference_weighted(adj: Adjacency, x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.view(*weight.shape, *[1] * (x.dim() - weight.dim()))
    return scatter(messages(adj, x) * weight, adj.destinations.long(), 0, adj.num_dst, "sum")


def reference_attention(adj: Adjacency, x: Tensor, logits: Tensor, scale: Tensor | None) -> Tensor:
    dst = adj.destinations.long()
    prob = softmax(logits, dst, num_nodes=adj.num_dst)
    return scatter(
        messages(adj, x) * (prob if scale is None else prob * scale).unsqueeze(-1), dst, 0, adj.num_dst, "sum"
    )
