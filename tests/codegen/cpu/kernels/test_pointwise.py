"""Kernels of one row at a time: the gate, and rows of a table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from guards import CLOSE, TYPES, Out, assert_close, rand
from native import Library


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("width", [1, 32, 77])
def test_silu_mul(lib: Library, t: str, width: int) -> None:
    both, y = rand(6, 2 * width, t=t, scale=3), Out(6, width, dtype=TYPES[t])
    up = both.view(-1)[width:]
    lib.call(f"silu_mul_{t}", y.tensor, both, up, 6, width, 2 * width, 2 * width)
    gate, up = both.double().chunk(2, -1)
    assert_close(y.check(), F.silu(gate) * up, CLOSE[t])


@pytest.mark.parametrize("t", TYPES)
def test_embedding_and_gather_rows(lib: Library, t: str) -> None:
    table, ids = rand(11, 7, t=t), torch.tensor([10, 0, 3, 3])
    a, b = Out(4, 7, dtype=TYPES[t]), Out(4, 7, dtype=TYPES[t])
    lib.call(f"embedding_{t}", a.tensor, table, ids, 4, 7)
    lib.call("gather_rows", b.tensor, table, ids, 4, 7 * table.element_size())
    assert torch.equal(a.check(), table[ids])
    assert torch.equal(b.check(), table[ids])
