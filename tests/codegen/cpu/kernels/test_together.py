"""Kernels together: rows do not see one another, nor the threads, nor scratch of an earlier call."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import Choices, Experts, choose, run_attend, run_linear
from guards import TYPES, rand
from native import Library, Value

from dcompile.codegen import pack


@pytest.mark.parametrize("t", TYPES)
def test_odd_widths_see_nothing_of_earlier_scratch(lib: Library, t: str) -> None:
    """A weight's odd K is padded with a zero, which a NaN left in scratch memory would spoil."""
    bad = torch.full((40, 520), math.nan, dtype=TYPES[t])
    x, w, layer = rand(3, 511, t=t), rand(40, 511, t=t), Experts(3, 9, 5, t)
    rows, chosen = rand(2, 9, t=t), choose(2, 3, 2)
    wanted = run_linear(lib, t, x, w, None, None).clone()
    wanted_rows = layer.run(lib, rows, *chosen).clone()
    for _ in range(2):
        y = torch.empty(40, 64, dtype=TYPES[t])
        packed = pack.pack_linear(rand(64, 520, t=t))
        lib.call(f"linear_{t}", y, bad, packed, None, None, 40, 64, 520)
        assert torch.equal(run_linear(lib, t, x, w, None, None), wanted)
        lib.call(f"linear_{t}", y, bad, packed, None, None, 40, 64, 520)
        assert torch.equal(layer.run(lib, rows, *chosen), wanted_rows)


@pytest.mark.parametrize("t", TYPES)
def test_rows_are_invariant(lib: Library, t: str) -> None:
    R, D, V, E, k = 61, 320, 4160, 8, 3
    x, w, layer = rand(R, D, t=t), rand(V, D, t=t), Experts(E, D, 160, t)
    weights, experts = choose(R, E, k)
    q, keys, values = rand(R, 4, 40, t=t), rand(2, 150, 2, 40, t=t), rand(2, 150, 2, 40, t=t)
    seq, limit = torch.arange(R) // 31, torch.where(torch.arange(R) < 50, 131, 150)

    def everything(rows: torch.Tensor) -> list[torch.Tensor]:
        a = x[rows].contiguous()
        at = (q[rows].contiguous(), keys, values, seq[rows].contiguous(), limit[rows].contiguous())
        routed = weights[rows].contiguous(), experts[rows].contiguous()
        return [
            run_linear(lib, t, a, w, None, None),
            layer.run(lib, a, *routed),
            run_attend(lib, t, *at),
            *Choices.run(lib, t, a, w, None, 3),
        ]

    every = torch.arange(R)
    lib.set_threads(2)
    whole = everything(every)
    lib.set_threads(1)
    for got, want in zip(everything(every), whole, strict=True):
        assert torch.equal(got, want)
    for rows in (
        torch.tensor([0]),
        torch.tensor([60]),
        torch.tensor([5, 33, 34, 59]),
        torch.arange(30, 47),
        torch.arange(7, 50),
    ):
        for got, want in zip(everything(rows), whole, strict=True):
            assert torch.equal(got, want[rows])
    lib.set_threads(2)


def test_a_list_of_kernels_runs_by_one_call(best: Library) -> None:
    x, index = torch.randn(4, 8), torch.tensor([3, 1])
    a, b = torch.empty(2, 8), torch.empty(2, 8)
    calls: list[tuple[str, list[Value]]] = [
        ("gather_rows", [a, x, index, 2, 32]),
        ("rms_norm_f32", [b, a, None, 2, 8, 0.0]),
    ]
    best.run(calls)
    assert torch.equal(a, x[index])
    assert all(s > 0 for s in best.run(calls, timed=True))
