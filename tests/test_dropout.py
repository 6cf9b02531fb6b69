r"""Dropout by raw id: any number of workers drops the same entries."""

from __future__ import annotations

import pytest
import torch
from gang import Gang, Worker
from graphs import directed_graph
from shares import assignments, cut
from torch import Tensor

from partpar import models
from partpar.nn import Dropout, GATConv


def rows_case(worker: Worker, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Raw ids and what is left of their rows and edges after three steps."""
    data = directed_graph()
    share = cut(data, assignments(60, worker.world_size)[kind], worker.rank, worker.group)
    rows, edges = Dropout(0.5, seed=3, layer=1), Dropout(0.25, seed=3, layer=2)
    for _ in range(3):
        kept = rows(torch.ones(share.owned.numel(), 2, 4), share.route)
        kept_edges = edges.drop_edges(torch.ones(share.edges.numel(), 2), share.edge_index, share.route)
    return share.owned, kept, share.edges, kept_edges


@pytest.mark.parametrize("kind", ["even", "empty part"])
def test_any_number_of_workers_drops_the_same(gang: Gang, kind: str) -> None:
    data = directed_graph()
    rows, edges = Dropout(0.5, seed=3, layer=1), Dropout(0.25, seed=3, layer=2)
    for _ in range(3):
        whole, whole_edges = rows(torch.ones(60, 2, 4)), edges.drop_edges(torch.ones(275, 2), data.edge_index)
    for world_size in (1, 2, 3, 4):
        results = gang.run(rows_case, world_size, kind)
        assert torch.cat([owned for owned, *_ in results]).unique().numel() == 60
        for owned, kept, own_edges, kept_edges in results:
            assert torch.equal(kept, whole[owned]) and torch.equal(kept_edges, whole_edges[own_edges])


def test_rate_scale_and_gradient() -> None:
    dropout = Dropout(0.3, layer=0)
    x = torch.ones(4000, 8, requires_grad=True)
    out = dropout(x)
    kept = out > 0
    assert abs(float(kept.double().mean()) - 0.7) < 5 * (0.3 * 0.7 / 32000) ** 0.5
    torch.testing.assert_close(out[kept].unique(), torch.tensor([1 / 0.7]))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert not torch.equal(dropout(x) > 0, kept), "the next step draws anew"
    assert not torch.equal(Dropout(0.3, layer=1)(x) > 0, kept) and not torch.equal(
        Dropout(0.3, seed=1, layer=0)(x) > 0, kept
    )
    assert not torch.equal(Dropout(0.3)(x) > 0, Dropout(0.3)(x) > 0), "layers without a number get one each"
    poisoned = torch.where(kept, 1.0, torch.inf)
    assert Dropout(0.3, layer=0)(poisoned).isfinite().all()


def test_when_nothing_is_drawn() -> None:
    x = torch.randn(5, 3)
    dropout = Dropout(0.5).eval()
    assert dropout(x) is x and int(dropout.step) == 0
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    edges = torch.zeros(2, 5, dtype=torch.int64)
    assert dropout.drop_edges(x, edges) is x
    with pytest.raises(ValueError, match="each of the 4 owned nodes"):
        from partpar import Route

        Dropout(0.5)(x, Route.trivial(4))


def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    x = torch.ones(50, 4)
    first = Dropout(0.5, layer=0)
    for _ in range(3):
        first(x)
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    expected = first(x)
    second = Dropout(0.5, layer=0)
    second.load_state_dict(saved)
    assert torch.equal(second(x), expected)
    second.reset_parameters()
    assert torch.equal(second(x), Dropout(0.5, layer=0)(x))


def test_weights_move_between_runs_with_and_without_dropout() -> None:
    x, edges = torch.randn(60, 8), directed_graph().edge_index
    plain, dropping = models.GAT(8, 4, 2, heads=2), models.GAT(8, 4, 2, heads=2, dropout=0.5)
    dropping(x, edges)
    dropping.load_state_dict(plain.state_dict())
    assert [int(m.step) for m in dropping.modules() if isinstance(m, Dropout)] == [1, 1, 1, 0], (
        "steps stay as they are"
    )
    plain.load_state_dict(dropping.state_dict())
    torch.testing.assert_close(dropping.eval()(x, edges), plain.eval()(x, edges))
    dropping.reset_parameters()
    assert not any(int(m.step) for m in dropping.modules() if isinstance(m, Dropout))


def test_every_layer_of_a_model_draws_for_itself() -> None:
    model = models.GAT(8, 4, 3, heads=2, dropout=0.5, seed=9)
    layers = [(m.seed, m.layer) for m in model.modules() if isinstance(m, Dropout)]
    assert len(set(layers)) == len(layers) == 6 and {seed for seed, _ in layers} == {9}


def test_parallel_edges_share_their_draw() -> None:
    edges = torch.tensor([[0, 0, 1, 2] * 50, [2, 2, 2, 1] * 50])
    conv = GATConv(3, 2, heads=8, dropout=0.5, add_self_loops=False, layer=0)
    _, (_, alpha) = conv(torch.randn(3, 3), edges, return_attention_weights=True)
    dropped = (alpha == 0).view(50, 4, 8)
    assert (dropped == dropped[:1]).all() and (dropped[:, 0] == dropped[:, 1]).all()
    assert not torch.equal(dropped[0, 0], dropped[0, 2]) and dropped[0].any() and not dropped[0].all()
