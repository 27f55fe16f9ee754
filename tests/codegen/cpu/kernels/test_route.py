"""Which experts a row is sent to."""

from __future__ import annotations

import math

import pytest
import torch
from guards import Out, assert_close, few, guarded
from hypothesis import given
from hypothesis import strategies as st
from native import Library, Value

from dcompile.ir.operators import SCORES


def run_route(
    lib: Library, logits: torch.Tensor, bias: torch.Tensor | None, k: int, *how: Value
) -> tuple[torch.Tensor, torch.Tensor]:
    R, E = logits.shape
    weights, experts = Out(R, k, dtype=torch.float32), Out(R, k, dtype=torch.int32)
    lib.call("route", weights.tensor, experts.tensor, logits, bias, R, E, k, *how)
    return weights.check(), experts.check()


def route_reference(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    score: int,
    groups: int,
    kept: int,
    renormalize: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    name = SCORES[score]
    z = logits.double()
    scores = z.sigmoid() if name.startswith("sigmoid") else z.softmax(-1)
    # Ties are decided on float32 values, as the kernel has them.
    keys = (scores if name in ("softmax", "sigmoid") else z).float()
    keys = keys + (0 if bias is None else bias)
    if groups > 1:
        grouped = keys.view(len(keys), groups, -1)
        two = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        keep = two.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        mask = torch.zeros_like(two).scatter_(1, keep, 1.0).bool()
        keys = grouped.masked_fill(~mask[..., None], -math.inf).flatten(1)
    experts = keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    if name == "softmax_chosen":
        weights = z.gather(1, experts).softmax(-1)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts.int()


@pytest.mark.parametrize("E, k", [(1, 1), (8, 8), (32, 4), (64, 8), (37, 5), (256, 8)])
@pytest.mark.parametrize("score", range(len(SCORES)), ids=SCORES)
@pytest.mark.parametrize("renormalize", [0, 1])
def test_route(lib: Library, E: int, k: int, score: int, renormalize: int) -> None:
    logits, bias = guarded(torch.randn(40, E)), guarded(torch.randn(E) * 0.1)
    for b in (None, bias):
        for groups, kept in [(1, 1), (4, 2)] if E % 4 == 0 and k <= E // 2 else [(1, 1)]:
            how = (score, groups, kept, renormalize, 2.5)
            weights, experts = run_route(lib, logits, b, k, *how)
            want_weights, want_experts = route_reference(logits, b, k, *how)
            assert torch.equal(experts, want_experts)
            assert_close(weights, want_weights, 1e-6)


@few
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 0.0, 2.0]), min_size=8, max_size=8),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(1, 8),
)
def test_route_breaks_ties_by_index(best: Library, rows: list[list[float]], k: int) -> None:
    logits = torch.tensor(rows)
    _, experts = run_route(best, logits, None, k, 0, 1, 1, 0, 1.0)
    assert torch.equal(
        experts, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].int()
    )


def test_logits_stay_apart_where_scores_do_not(lib: Library) -> None:
    """Softmax rounds all but the best to 0, sigmoid all to 1: only the logits know the order."""
    logits = torch.tensor([[200.0, 30.0, 40.0, 50.0, 41.0]])
    for score, order in [
        (0, [0, 1, 2]),
        (1, [0, 1, 2]),
        (2, [0, 3, 4]),
        (3, [0, 3, 4]),
        (4, [0, 3, 4]),
    ]:
        assert run_route(lib, logits, None, 3, score, 1, 1, 0, 1.0)[1].tolist() == [order]


@pytest.mark.parametrize("sigmoid", [0, 1])
@pytest.mark.parametrize("groups", [1, 4])
def test_route_survives_nan(lib: Library, sigmoid: int, groups: int) -> None:
    logits = torch.randn(5, 16)
    logits[0], logits[1, 3], logits[2, ::2], logits[3, 4] = math.nan, math.nan, math.nan, math.inf
    _, experts = run_route(lib, logits, None, 6, sigmoid, groups, min(groups, 2), 1, 1.0)
    for row in experts.tolist():
        assert len(set(row)) == 6 and all(0 <= e < 16 for e in row)
    if sigmoid and groups == 1:
        assert 3 not in experts[1].tolist()
