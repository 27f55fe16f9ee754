"""Routing: the experts exactly as the operator's reference has them, the weights to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import route
from dcompile.codegen.triton.tiles import Tiles
from dcompile.ir import operators

ROUTERS = {
    "llada_moe": {"num_experts": 7, "top_k": 3},
    "sdar": {"num_experts": 16, "top_k": 2, "renormalize": True},
    "llada2": {
        **{"num_experts": 12, "top_k": 4, "score": "sigmoid", "groups": 4, "kept_groups": 2},
        **{"renormalize": True, "scale": 2.5},
    },
    "mixtral": {"num_experts": 9, "top_k": 2, "score": "softmax_chosen"},
    "by_logits": {"num_experts": 8, "top_k": 3, "score": "softmax_by_logits", "renormalize": True},
    "sigmoid_by_logits": {"num_experts": 8, "top_k": 3, "score": "sigmoid_by_logits"},
    "lonely_groups": {"num_experts": 5, "top_k": 2, "groups": 5, "kept_groups": 3},
}


def reference(
    logits: torch.Tensor, bias: torch.Tensor | None, router: dict[str, object]
) -> tuple[torch.Tensor, torch.Tensor]:
    full = {"score": "softmax", "groups": 1, "kept_groups": 1, "renormalize": False, "scale": 1.0}
    full |= {k: v for k, v in router.items() if k != "num_experts"}
    names = ("top_k", "score", "groups", "kept_groups", "renormalize", "scale")
    return operators.ROUTE(logits, bias, *(full[n] for n in names))


def check(name: str, logits: torch.Tensor, bias: torch.Tensor | None, t: str = "f32") -> None:
    router, R = ROUTERS[name], len(logits)
    weights = poisoned(R, router["top_k"], dtype=torch.float32)
    experts = poisoned(R, router["top_k"], dtype=torch.int32)
    lowering = route.launches(
        rows={"R": 1}, dtype=t, bias="f32" if bias is not None else None, **router
    )
    tensors = {"weights": weights, "experts": experts, "logits": logits, "bias": bias}
    run(lowering, tensors, R=R)
    want, chosen = reference(logits, bias, router)
    assert torch.equal(experts, chosen)
    assert torch.allclose(weights, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("biased", [True, False])
def test_route(name: str, biased: bool) -> None:
    E = ROUTERS[name]["num_experts"]
    check(name, torch.randn(5, E) * 2, torch.randn(E) if biased else None)
    check(name, (torch.randn(3, E) * 2).bfloat16(), None, t="bf16")


values = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(ROUTERS)), drawn=st.lists(values, min_size=16, max_size=16))
def test_ties_go_to_the_lowest_index(name: str, drawn: list[float]) -> None:
    E = ROUTERS[name]["num_experts"]
    logits = torch.tensor([drawn[:E], [0.0] * E])
    check(name, logits, torch.tensor(drawn[::-1][:E]))


def test_nan_counts_as_lowest() -> None:
    logits = torch.randn(2, 12)
    logits[0, 3] = torch.nan
    check("llada2", logits, torch.randn(12))


@pytest.mark.parametrize("t", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["llada_moe", "llada2"])
def test_product_and_route_in_one_launch(t: str, name: str) -> None:
    """Integers, so that the product is exact and the choice the same as behind a stored one."""
    router, R, K = ROUTERS[name], 18, 70
    E = router["num_experts"]
    x = torch.randint(-2, 3, (R, K)).to(TYPES[t])
    w = torch.randint(-1, 2, (E, K)).to(TYPES[t])
    b, bias = torch.randint(-2, 3, (E,)).to(TYPES[t]), torch.randn(E)
    weights = poisoned(R, router["top_k"], dtype=torch.float32)
    experts = poisoned(R, router["top_k"], dtype=torch.int32)
    lowering = route.product_launches(
        **{"rows": {"R": 1}, "hidden": K, "dtype": t, "bias": "f32", "product_bias": True},
        **{"tiles": Tiles(16, 0, 32, splits=2, stages=1), **router},
    )
    tensors = {"weights": weights, "experts": experts, "x": x, "w": w, "b": b, "bias": bias}
    run(lowering, tensors, R=R)
    want, chosen = reference(torch.nn.functional.linear(x, w, b), bias, router)
    assert torch.equal(experts, chosen)
    assert torch.allclose(weights, want, rtol=1e-5, atol=1e-7)


def test_a_product_in_wider_weights_than_rows() -> None:
    """Routers that widen their rows: the cast is part of the product."""
    router, R, K = ROUTERS["llada2"], 5, 40
    E = router["num_experts"]
    x, w = torch.randn(R, K).bfloat16(), torch.randn(E, K)
    weights = poisoned(R, router["top_k"], dtype=torch.float32)
    experts = poisoned(R, router["top_k"], dtype=torch.int32)
    lowering = route.product_launches(
        **{"rows": {"R": 1}, "hidden": K, "dtype": "bf16", "w_dtype": "f32"},
        **{"tiles": Tiles(16, 0, 32, splits=2, stages=1), **router},
    )
    run(lowering, {"weights": weights, "experts": experts, "x": x, "w": w}, R=R)
    want, chosen = reference((x.double() @ w.double().T).float(), None, router)
    assert torch.equal(experts, chosen)
    assert torch.allclose(weights, want, rtol=1e-5, atol=1e-6)
