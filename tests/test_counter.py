r"""Counter-based random numbers: the same bits everywhere, and random ones."""

import numpy as np
import pytest
import torch

from partpar.kernels import counter
from partpar.kernels.bits import bits, shift

N = 20_000


def test_known_words() -> None:
    r"""The column stream is SplitMix64: from state 0, its published first outputs."""
    drawn = [int(counter.draw(np.uint64(0), np.uint64(column))) for column in range(3)]
    assert drawn == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_fallback_gives_the_same_bits(dtype: torch.dtype) -> None:
    ids = torch.cat(
        [torch.arange(100), torch.randint(-(2**62), 2**62, (100,)), torch.tensor([2**63 - 1, -(2**63)])]
    )
    for words in [(0, 0, 0), (-5, 2**63, 9), (1 << 70, 3, 1 << 32)]:
        drawn = bits(counter.key(*words), ids, 5)
        digits = counter._DIGITS[dtype]
        expected = (shift(drawn, 64 - digits).double() * 2.0**-digits).to(dtype)
        found = counter.uniform(*words, ids, 5, dtype)
        assert torch.equal(found, expected)
        assert found.min() >= 0 and found.max() < 1
        kept = counter.below(0.3, *words, ids, 5)
        assert torch.equal(kept, shift(drawn, 11) < torch.tensor(0.3 * 2**53).double().ceil())
        assert torch.equal(kept, counter.uniform(*words, ids, 5, torch.float64) < 0.3)


def test_a_draw_depends_on_its_words_alone() -> None:
    ids = torch.randperm(1000)[:300]
    whole = counter.uniform(1, 2, 3, torch.arange(1000), 8)
    assert torch.equal(counter.uniform(1, 2, 3, ids, 8), whole[ids])
    assert torch.equal(counter.uniform(1, 2, 3, ids, 5), whole[ids, :5])
    strided = torch.arange(2000)[::2]
    assert torch.equal(counter.uniform(1, 2, 3, strided, 2), counter.uniform(1, 2, 3, strided.clone(), 2))


def test_uniform_by_chi_square() -> None:
    r"""256 cells, 160 thousand draws, over ids, columns and steps: chi-square within 6 deviations of its
    mean, 255."""
    ids = torch.arange(N)
    for drawn in (
        counter.uniform(0, 0, 0, ids, 8, torch.float64),
        counter.uniform(0, 0, 0, ids[:8] * 2**40, N, torch.float64),
        torch.cat([counter.uniform(0, step, 0, ids[:40], 40, torch.float64) for step in range(100)]),
    ):
        counts = torch.bincount((drawn.flatten() * 256).long(), minlength=256).double()
        expected = drawn.numel() / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 6 * (2 * 255) ** 0.5


@pytest.mark.parametrize("bit", [0, 1, 10, 63])
def test_neighbours_are_not_correlated(bit: int) -> None:
    r"""Draws of ids, columns, steps, layers and seeds that differ by one bit: correlation within 5 deviations
    of 0."""
    ids, flip = torch.arange(N), (1 << bit) if bit < 63 else -(2**63)
    drawn = counter.uniform(7, 0, 0, ids, 4, torch.float64)
    others = {
        "ids": counter.uniform(7, 0, 0, ids ^ flip, 4, torch.float64),
        "columns": drawn.roll(1, dims=1),
        "steps": counter.uniform(7, flip, 0, ids, 4, torch.float64),
        "layers": counter.uniform(7, 0, flip, ids, 4, torch.float64),
        "seeds": counter.uniform(7 ^ flip, 0, 0, ids, 4, torch.float64),
        "step for layer": counter.uniform(7, 1, 2, ids, 4, torch.float64).roll(1, dims=0),
    }
    for name, other in others.items():
        correlation = float(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 5 / drawn.numel() ** 0.5, name
    words = {counter.key(*w) for w in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]}
    assert len(words) == 6


def test_every_bit_is_fair() -> None:
    drawn = bits(counter.key(3, 1, 4), torch.arange(N), 4).flatten()
    ones = torch.stack(
        [(shift(drawn, b) & 1).double().mean() for b in range(1, 64)] + [(drawn & 1).double().mean()]
    )
    assert (ones - 0.5).abs().max() < 5 * 0.5 / drawn.numel() ** 0.5


def test_pairs_get_ids_of_their_own() -> None:
    first, second = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    ids = counter.pair_ids(first.flatten(), second.flatten())
    assert ids.unique().numel() == ids.numel()
    share = counter.below(0.25, 0, 0, 0, ids, 1).view(300, 300).double()
    assert abs(float(share.mean()) - 0.25) < 5 * (0.25 * 0.75 / ids.numel()) ** 0.5
    assert (share.mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5  # no source is favoured


def test_edges_of_probability() -> None:
    ids = torch.arange(50)
    assert not counter.below(0.0, 0, 0, 0, ids, 3).any() and counter.below(1.0, 0, 0, 0, ids, 3).all()
    assert counter.uniform(0, 0, 0, ids[:0], 3).shape == (0, 3) and counter.below(
        0.5, 0, 0, 0, ids, 0
    ).shape == (50, 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda ids: counter.below(1.5, 0, 0, 0, ids, 1), "probability in .0, 1., found 1.5"),
        (lambda ids: counter.uniform(0, 0, 0, ids.int(), 1), "int64 ids, found torch.int32"),
        (lambda ids: counter.uniform(0, 0, 0, ids.view(2, 2), 1), r"found torch.int64 of shape \(2, 2\)"),
        (lambda ids: counter.uniform(0, 0, 0, ids, 1, torch.int64), "found torch.int64"),
        (lambda ids: counter.uniform(0, 0, 0, ids, -1), "found -1"),
    ],
)
def test_bad_input(call, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        call(torch.arange(4))
