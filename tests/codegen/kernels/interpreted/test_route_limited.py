"""Limited routing: the experts exactly as the operator's reference has them, the weights to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import route, route_limited
from dcompile.ir.operators.route_limited import route_limited as reference

SLOTS = 3


def check(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    places: tuple[torch.Tensor, ...],
    k: int,
    score: str,
    groups: tuple[int, int],
    limits: tuple[float, bool, int],
    t: str = "f32",
) -> torch.Tensor:
    """row_seq, row_pos, block_seq, block_pos; capacity, reroute, pool."""
    R, E = logits.shape
    weights, experts = poisoned(R, k, dtype=torch.float32), poisoned(R, k, dtype=torch.int32)
    capacity, reroute, pool = limits
    lowering = route_limited.launches(
        **{"rows": {"R": 1}, "blocks": {"B": 1}, "slots": SLOTS, "num_experts": E, "top_k": k},
        **{"block_length": places[3].shape[1], "score": score, "renormalize": True, "scale": 2.5},
        **{"groups": groups[0], "kept_groups": groups[1], "capacity": capacity, "pool": pool},
        **{"overflow_reroutes": reroute, "dtype": t, "bias": "f32" if bias is not None else None},
    )
    names = ("row_seq", "row_pos", "block_seq", "block_pos")
    tensors = {"weights": weights, "experts": experts, "logits": logits, "bias": bias}
    run(lowering, {**tensors, **dict(zip(names, places, strict=True))}, R=R, B=len(places[2]))
    want, chosen = reference(logits, bias, *places, k, score, *groups, True, 2.5, *limits)
    assert torch.equal(experts, chosen)
    assert torch.allclose(weights, want, rtol=1e-5, atol=1e-7, equal_nan=True)
    return experts


def places() -> tuple[torch.Tensor, ...]:
    """Rows of three sequences in any order, one of which has no block."""
    seq = torch.tensor([2] * 5 + [0] * 3 + [1] * 9)[torch.randperm(17)]
    blocks = torch.tensor([0, 2]), torch.tensor([[3, 4, 5], [9, 10, 11]])
    return seq, torch.randint(0, 40, (17,)), *blocks


@pytest.mark.parametrize(
    ("E", "k", "groups", "capacity", "reroute", "pool"),
    [(8, 2, 1, 1.0, 0, 0), (13, 3, 1, 1.5, 1, 0), (16, 2, 4, 0.0, 0, 5), (37, 5, 1, 0.7, 1, 9)],
)
@pytest.mark.parametrize("score", ["softmax", "softmax_chosen"])
def test_route_limited(
    E: int, k: int, groups: int, capacity: float, reroute: int, pool: int, score: str
) -> None:
    at = places()
    logits = torch.randn(17, E).mul(2).round()
    logits[3, 1], logits[4] = math.nan, math.nan
    bias = None if score == "softmax" else torch.randn(E) * 0.1
    limits = (capacity, bool(reroute), pool)
    experts = check(logits, bias, at, k, score, (groups, min(groups, 2)), limits)
    assert pool or reroute or (experts < 0).any()


@pytest.mark.parametrize("score", sorted({*route.SCORES} - {"softmax", "softmax_chosen"}))
def test_other_scores(score: str) -> None:
    check(torch.randn(17, 6), torch.randn(6), places(), 2, score, (1, 1), (0.8, True, 4))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=SLOTS),
    E=st.integers(2, 9),
    capacity=st.sampled_from([0.3, 1.0, 1.1, 1.5]),
    reroute=st.booleans(),
    one=st.booleans(),
    data=st.data(),
)
def test_sizes_ties_and_overloaded_experts(
    rows: list[int], E: int, capacity: float, reroute: bool, one: bool, data: st.DataObject
) -> None:
    k, pool = data.draw(st.integers(1, min(E, 3))), data.draw(st.integers(0, E))
    pool = pool if pool >= k else 0
    seq = torch.tensor([s for s, n in enumerate(rows) for _ in range(n)])
    pos = torch.tensor([p for n in rows for p in range(n)])
    blocks = torch.arange(len(rows)), torch.arange(4).expand(len(rows), 4).contiguous()
    logits = torch.randn(len(seq), E).round()
    if one:
        logits[:, 0] = 9.0  # all rows want the first expert
    check(logits, None, (seq, pos, *blocks), k, "softmax", (1, 1), (capacity, reroute, pool))


def test_rounded_logits() -> None:
    logits = torch.randn(17, 12).to(TYPES["bf16"])
    check(logits, None, places(), 3, "sigmoid", (4, 2), (1.0, True, 7), t="bf16")
