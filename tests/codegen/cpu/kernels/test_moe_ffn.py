"""The mixture of experts, under any assignment of rows."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import Experts, choose
from guards import CLOSE, TYPES, assert_close, few, rand
from hypothesis import given
from hypothesis import strategies as st
from native import Library


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, D, width, E, k",
    [
        (1, 8, 5, 3, 2),
        (33, 64, 48, 8, 3),
        (7, 70, 33, 4, 4),
        (90, 40, 32, 5, 1),
        (3, 520, 516, 16, 2),
        (44, 264, 160, 10, 3),  # over 2 MiB of weights
        (130, 96, 140, 30, 4),
    ],
)
def test_moe_ffn(lib: Library, t: str, R: int, D: int, width: int, E: int, k: int) -> None:
    for act, biased in [(0, False), (1, True), (2, True), (3, True)]:
        layer = Experts(E, D, width, t, biased)
        x, chosen = rand(R, D, t=t), choose(R, E, k)
        assert_close(layer.run(lib, x, *chosen, act), layer.reference(x, *chosen, act), CLOSE[t])


@few
@given(data=st.data(), t=st.sampled_from([*TYPES]))
def test_moe_ffn_any_assignment(best: Library, data: st.DataObject, t: str) -> None:
    torch.manual_seed(1)
    E, k = 6, data.draw(st.integers(1, 6))
    rows = data.draw(st.lists(st.permutations(range(E)), min_size=1, max_size=40))
    experts = torch.tensor(rows)[:, :k].int().contiguous()
    layer, x, weights = Experts(E, 33, 20, t), rand(len(rows), 33, t=t), torch.rand(len(rows), k)
    got = layer.run(best, x, weights, experts)
    assert_close(got, layer.reference(x, weights, experts), CLOSE[t])


@pytest.mark.parametrize("t", TYPES)
def test_moe_ffn_one_expert_takes_all_of_many_rows(best: Library, t: str) -> None:
    R = 4096
    layer, x = Experts(8, 48, 32, t), rand(R, 48, t=t)
    weights, experts = torch.rand(R, 1), torch.full((R, 1), 5, dtype=torch.int32)
    assert_close(
        layer.run(best, x, weights, experts), layer.reference(x, weights, experts), CLOSE[t]
    )


@pytest.mark.parametrize("t", TYPES)
def test_moe_ffn_keeps_bad_rows_apart(lib: Library, t: str) -> None:
    layer, x = Experts(4, 40, 24, t), rand(20, 40, t=t)
    weights, experts = choose(20, 4, 2)
    good = layer.run(lib, x, weights, experts).clone()
    x[3, 5], x[7, 0] = math.nan, math.inf
    y = torch.empty_like(x)
    sizes = (20, 40, 24, 4, 2, 0)
    lib.call(f"moe_ffn_{t}", y, x, weights, experts, *layer.packed, *layer.biases, *sizes)
    rest = [r for r in range(20) if r not in (3, 7)]
    assert torch.equal(y[rest], good[rest])
    assert y[3].isnan().all()
    assert not y[7].isfinite().all()
