"""The mixture of embeddings by softmax of the vocabulary projection."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import run_linear
from guards import CLOSE, TYPES, Out, assert_close, guarded, rand
from native import Library

from dcompile.codegen import pack


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, V, D, E", [(1, 2, 4, 4), (7, 1000, 64, 33), (40, 515, 33, 64), (150, 256, 16, 16)]
)
def test_soft_embed(lib: Library, t: str, R: int, V: int, D: int, E: int) -> None:
    x, w, bias = rand(R, D, t=t), rand(V, D, t=t, scale=0.5), rand(V, t=t)
    table, weight = rand(V + 3, E, t=t), torch.rand(R)
    live = (torch.rand(R) > 0.3).to(torch.uint8)
    live[0] = 1

    def run(rows: torch.Tensor) -> torch.Tensor:
        out = Out(len(rows), E, dtype=TYPES[t])
        packed = guarded(pack.pack_linear(w))
        shape = (len(rows), V, D, E, len(table))
        lib.call(
            f"soft_embed_{t}",
            out.tensor,
            x[rows],
            packed,
            bias,
            table,
            live[rows],
            weight[rows],
            *shape,
        )
        return out.check()

    y = run(torch.arange(R))
    z = run_linear(lib, t, x, w, bias, None).double()
    wanted = weight[:, None].double() * (z.softmax(-1) @ table[:V].double())
    assert (y[live == 0] == 0).all()
    assert_close(y[live == 1], wanted[live == 1], CLOSE[t])
    # A row's bits are its own.
    some = torch.randperm(R)[: max(R // 2, 1)]
    assert torch.equal(run(some), y[some])


def test_soft_embed_with_infinite_and_nan_logits(lib: Library) -> None:
    w = torch.tensor([[math.inf], [1.0], [math.nan]])
    out = Out(2, 2, dtype=torch.float32)
    table, one = torch.ones(3, 2), torch.ones(2)
    x = torch.tensor([[1.0], [-1.0]])
    args = (x, guarded(pack.pack_linear(w)), None, table, torch.ones(2, dtype=torch.uint8), one)
    lib.call("soft_embed_f32", out.tensor, *args, 2, 3, 1, 2, 3)
    # +inf leaves no probability; -inf leaves the finite logit, and a NaN counts as -inf.
    assert torch.equal(out.check(), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
