r"""The random bits of :mod:`partpar.kernels.counter` in torch, whose int64 wraps around like uint64: the same on every
device, and without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

# Weyl increment and multipliers of SplitMix64 (Stafford's variant 13 of MurmurHash3's finaliser).
WEYL, MUL_1, MUL_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def key(seed: int, step: int, layer: int) -> int:
    r"""The 64-bit key of everything drawn for one layer at one step."""
    state = WEYL
    for word in (seed, step, layer):
        state = ((state ^ (word & _WORD)) + WEYL) & _WORD
        state = ((state ^ (state >> 30)) * MUL_1) & _WORD
        state = ((state ^ (state >> 27)) * MUL_2) & _WORD
        state ^= state >> 31
    return state


def signed(word: int) -> int:
    r"""64 bits as torch has them."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def shift(words: Tensor, by: int) -> Tensor:
    r"""Shifts zeros in from the left, where ``>>`` repeats the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def mix(words: Tensor) -> Tensor:
    r"""A bijection of 64-bit words in which every input bit reaches every output bit."""
    words = (words ^ shift(words, 30)) * signed(MUL_1)
    words = (words ^ shift(words, 27)) * signed(MUL_2)
    return words ^ shift(words, 31)


def bits(state: int, ids: Tensor, num_columns: int) -> Tensor:
    r"""The 64 random bits of each column of each id, int64 ``[N, num_columns]``; ``state`` is a :func:`key`."""
    rows = mix((ids ^ signed(state)) + signed(WEYL))
    columns = (torch.arange(num_columns, device=ids.device) + 1) * signed(WEYL)
    return mix(rows.unsqueeze(1) + columns)
