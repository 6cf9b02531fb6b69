r"""Sharded tables without a compiler, which takes more memory than many a table's shard."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from partpar.kernels import counter
from partpar.kernels.whole_rows import fetch_rows, put_rows, whole
from partpar.sharded import Uniform

SCRIPT = """
import sys, torch
import partpar
from partpar.sharded import DistEmbedding, DistTensor, Normal, SparseAdagrad, SparseAdam, SparseSGD
with partpar.init():
    table = DistEmbedding(20, 4, "t", Normal(std=0.1))
    for kind in (SparseSGD, SparseAdagrad, SparseAdam):
        optimizer = kind([table])
        table(torch.tensor([3, 3, 19])).sum().backward()
        optimizer.step()
    t = DistTensor((5, 2))
    t[torch.tensor([1])] = 2.0
    assert t[torch.tensor([1, 0])].tolist() == [[2.0, 2.0], [0.0, 0.0]]
print([name for name in ("numba", "llvmlite", "torch_geometric") if name in sys.modules])
"""


def test_tables_and_optimisers_load_no_compiler() -> None:
    told = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_first_values_are_those_of_the_counter(dtype: torch.dtype) -> None:
    rows = torch.empty(70_001, 5, dtype=dtype)
    Uniform(seed=7).fill(rows, 11)
    ids = torch.arange(11, 70_012)
    assert torch.equal(rows, counter.uniform(7, 0, 0, ids, 5, torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.complex64])
def test_rows_move_whole(dtype: torch.dtype) -> None:
    table = torch.randint(0, 2, (3000, 3, 2)).to(dtype)
    rows, at = np.random.default_rng(0).integers(0, 3000, 2000), np.random.default_rng(1).permutation(2000)
    found, placed = torch.empty(2000, 3, 2, dtype=dtype), torch.empty(2000, 3, 2, dtype=dtype)
    assert fetch_rows(whole(table), rows, whole(found)) == -1 and torch.equal(found, table[rows])
    assert fetch_rows(whole(table), rows, whole(placed), at) == -1 and torch.equal(placed[at], found)
    put = table.clone()
    assert put_rows(whole(put), rows[:9].repeat(2), whole(found[:18])) == -1
    assert torch.equal(put[rows[8]], found[17])
    for wrong in (-1, 3000):
        before = put.clone()
        assert put_rows(whole(put), np.array([0, wrong]), whole(found[:2])) == 1 and torch.equal(put, before)
        assert fetch_rows(whole(table), np.array([0, 1, wrong]), whole(found[:3])) == 2
