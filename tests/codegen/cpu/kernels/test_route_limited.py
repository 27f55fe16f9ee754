"""Routing with a capacity and with a pool of experts, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from guards import Out, assert_close, guarded
from native import Library

from dcompile.ir.operators import SCORES
from dcompile.ir.operators.route_limited import route_limited


@pytest.mark.parametrize(
    "E, k, groups, capacity, reroute, pool",
    [(8, 2, 1, 1.0, 0, 0), (13, 3, 1, 1.5, 1, 0), (16, 2, 4, 0.0, 0, 5), (37, 5, 1, 0.7, 1, 9)],
)
@pytest.mark.parametrize("score", range(len(SCORES)), ids=SCORES)
def test_route_limited(
    lib: Library, E: int, k: int, groups: int, capacity: float, reroute: int, pool: int, score: int
) -> None:
    """The same experts as the reference, and its weights to rounding; rows in any order."""
    seq = torch.tensor([2] * 9 + [0] * 5 + [1] * 17)[torch.randperm(31)]
    pos = torch.randint(0, 40, (31,))
    blocks = torch.tensor([0, 2]), torch.tensor([[3, 4, 5], [9, 10, 11]])
    logits, bias = guarded(torch.randn(31, E).mul(2).round()), guarded(torch.randn(E) * 0.1)
    logits[3, 1], logits[4] = math.nan, math.nan
    for b in (None, bias):
        kept = min(groups, 2)
        how = (SCORES[score], groups, kept, True, 2.5, capacity, bool(reroute), pool)
        wanted = route_limited(logits, b, seq, pos, *blocks, k, *how)
        weights, experts = Out(31, k, dtype=torch.float32), Out(31, k, dtype=torch.int32)
        out = weights.tensor, experts.tensor
        numbers = (31, 2, E, k, score, groups, kept, 1, 2.5, capacity, reroute, pool, 3)
        lib.call("route_limited", *out, logits, b, seq, pos, *blocks, *numbers)
        assert torch.equal(experts.check(), wanted[1])
        good = wanted[0].isfinite()
        assert torch.equal(good, weights.check().isfinite())
        assert_close(weights.check()[good], wanted[0][good].double(), 1e-6)
