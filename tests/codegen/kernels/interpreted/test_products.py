"""Linear layers and mixtures of experts against float64; a row does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from close import CLOSE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import linear, moe_ffn
from dcompile.codegen.triton.assemble import PACKAGE
from dcompile.codegen.triton.tiles import Tiles

both = pytest.mark.parametrize("t", ["f32", "bf16"])
few = settings(max_examples=4, deadline=None, derandomize=True)
ACTIVATIONS = {
    **{"silu": F.silu, "gelu": F.gelu, "relu": torch.relu},
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
}


def tiles(splits: int = 1) -> Tiles:
    return Tiles(16, 32, 32, splits, warps=4, stages=1)


@both
@pytest.mark.parametrize(
    ("R", "N", "K", "splits", "bias"),
    [(1, 5, 7, 1, True), (17, 33, 70, 2, False), (3, 64, 64, 2, True), (2, 3, 33, 4, False)],
)
def test_linear(t: str, R: int, N: int, K: int, splits: int, bias: bool) -> None:
    x, w, b = (torch.randn(*s).to(TYPES[t]) for s in ((R, K), (N, K), (N,)))
    other, y = torch.randn(R, N).to(TYPES[t]), poisoned(R, N, dtype=TYPES[t])
    lowering = linear.launches(
        **{"rows": {"R": 1}, "n": N, "k": K, "dtype": t, "arch": 90, "bias": bias},
        **{"other": t, "tiles": tiles(splits)},
    )
    run(lowering, {"y": y, "x": x, "w": w, "bias": b, "other": other}, R=R)
    want = x.double() @ w.double().T + other.double() + (b.double() if bias else 0)
    assert_close(y, want, CLOSE[t])


def test_an_epilogue_of_its_own_and_another_result_type() -> None:
    x, w = torch.randn(3, 40).bfloat16(), torch.randn(6, 40).bfloat16()
    y = poisoned(3, 6, dtype=torch.float32)
    lowering = linear.launches(
        **{"rows": {"R": 1}, "n": 6, "k": 40, "dtype": "bf16", "arch": 90, "out_dtype": "f32"},
        **{"epilogue": f"{PACKAGE}.pointwise:silu_epilogue", "tiles": tiles()},
    )
    run(lowering, {"y": y, "x": x, "w": w}, R=3)
    assert_close(y, F.silu(x.double() @ w.double().T), CLOSE["f32"])


@pytest.mark.parametrize(
    ("t", "activation"), [*(("f32", name) for name in ACTIVATIONS), ("bf16", "silu")]
)
def test_gated(t: str, activation: str) -> None:
    R, N, K = 5, 33, 70
    x, w = torch.randn(R, K).to(TYPES[t]), (torch.randn(2 * N, K) * K**-0.5).to(TYPES[t])
    b, y = torch.randn(2 * N).to(TYPES[t]), poisoned(R, N, dtype=TYPES[t])
    lowering = linear.gated_launches(
        **{"rows": {"R": 1}, "n": N, "k": K, "dtype": t, "arch": 90, "activation": activation},
        **{"bias": True, "tiles": tiles()},
    )
    run(lowering, {"y": y, "x": x, "w": w, "bias": b}, R=R)
    gate, up = (x.double() @ w.double().T + b.double()).chunk(2, -1)
    assert_close(y, ACTIVATIONS[activation](gate) * up, CLOSE[t])


def test_a_row_of_linear_does_not_depend_on_its_neighbours() -> None:
    x, w = torch.randn(21, 130), torch.randn(9, 130)
    shape = {"rows": {"R": 1}, "n": 9, "k": 130, "dtype": "f32", "arch": 90, "tiles": tiles(3)}
    together = poisoned(21, 9, dtype=torch.float32)
    run(linear.launches(**shape), {"y": together, "x": x, "w": w}, R=21)
    for r in (0, 20):
        alone = poisoned(1, 9, dtype=torch.float32)
        run(linear.launches(**shape), {"y": alone, "x": x[r : r + 1].clone(), "w": w}, R=1)
        assert torch.equal(alone[0], together[r])


class Mixture:
    """A small mixture of experts, its kernel and its formula."""

    def __init__(self, t: str, shared: int, bias: bool, activation: str = "silu") -> None:
        self.t, self.shared, self.bias, self.activation = t, shared, bias, activation
        self.D, self.F, self.E, self.k = 40, 24, 5, 2
        count, dtype = self.E + shared, TYPES[t]
        self.gate_up = (torch.randn(count, 2 * self.F, self.D) * self.D**-0.5).to(dtype)
        self.down = (torch.randn(count, self.D, self.F) * self.F**-0.5).to(dtype)
        self.gate_up_bias = torch.randn(count, 2 * self.F).to(dtype)
        self.down_bias = torch.randn(count, self.D).to(dtype)

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        limited: bool = False,
    ) -> torch.Tensor:
        y = poisoned(*x.shape, dtype=x.dtype)
        lowering = moe_ffn.launches(
            **{"rows": {"R": 1}, "hidden": self.D, "width": self.F, "num_experts": self.E},
            **{"top_k": self.k, "dtype": self.t, "arch": 90, "shared": self.shared},
            **{"gate_up_bias": self.bias, "down_bias": self.bias, "up_tiles": tiles()},
            **{"out_tiles": tiles(), "activation": self.activation, "limited": limited},
        )
        weights_of = {"gate_up": self.gate_up, "down": self.down}
        weights_of |= {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        run(
            lowering,
            {"y": y, "x": x, "weights": weights, "experts": experts, **weights_of},
            R=len(x),
        )
        return y

    def formula(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for r in range(len(x)):
            chosen = list(zip(experts[r].tolist(), weights[r].double(), strict=True))
            chosen = [(e, weight) for e, weight in chosen if e >= 0]
            chosen += [(self.E + s, torch.tensor(1.0)) for s in range(self.shared)]
            for e, weight in chosen:
                gate_up = self.gate_up[e].double() @ x[r].double()
                gate, up = (gate_up + self.gate_up_bias[e].double() * self.bias).chunk(2)
                y = self.down[e].double() @ (ACTIVATIONS[self.activation](gate) * up)
                out[r] += weight * (y + self.down_bias[e].double() * self.bias)
        return out


@both
@pytest.mark.parametrize(("shared", "bias", "activation"), [(0, False, "silu"), (1, True, "gelu")])
def test_moe_ffn(t: str, shared: int, bias: bool, activation: str) -> None:
    mixture = Mixture(t, shared, bias, activation)
    x, weights = torch.randn(7, mixture.D).to(TYPES[t]), torch.rand(7, 2)
    experts = torch.stack([torch.randperm(mixture.E)[:2] for _ in range(7)]).int()
    got = mixture.run(x, weights, experts)
    assert_close(got, mixture.formula(x, weights, experts), 2 * CLOSE[t])


@few
@given(
    assignment=st.lists(st.sampled_from([(0, 1), (3, 0), (4, 2), (1, 0)]), min_size=1, max_size=19)
    | st.just([(3, 1)] * 18)
)
def test_any_assignment_of_experts(assignment: list[tuple[int, int]]) -> None:
    """All rows to the same experts, some to none; more rows than a tile has."""
    mixture = Mixture("f32", 0, False)
    x, weights = torch.randn(len(assignment), mixture.D), torch.rand(len(assignment), 2)
    experts = torch.tensor(assignment, dtype=torch.int32)
    got = mixture.run(x, weights, experts)
    assert_close(got, mixture.formula(x, weights, experts), CLOSE["f32"])
    alone = mixture.run(x[-1:].clone(), weights[-1:].clone(), experts[-1:].clone())
    assert torch.equal(alone[0], got[-1]), "a row depends on the rows beside it"


def test_experts_without_rows_are_never_read() -> None:
    mixture = Mixture("f32", 0, False)
    mixture.gate_up[2:], mixture.down[2:] = torch.nan, torch.nan
    x, weights = torch.randn(3, mixture.D), torch.rand(3, 2)
    experts = torch.tensor([[0, 1]] * 3, dtype=torch.int32)
    assert_close(mixture.run(x, weights, experts), mixture.formula(x, weights, experts), 1e-5)


@both
@pytest.mark.parametrize("shared", [0, 1])
def test_slots_without_an_expert_add_nothing(t: str, shared: int) -> None:
    """Limited routing leaves -1; a row may have lost all its experts."""
    mixture = Mixture(t, shared, False)
    x, weights = torch.randn(19, mixture.D).to(TYPES[t]), torch.rand(19, 2)
    experts = torch.stack([torch.randperm(mixture.E)[:2] for _ in range(19)]).int()
    experts[torch.rand(19, 2) < 0.4] = -1
    experts[0], experts[1, 0] = -1, 3
    got = mixture.run(x, weights, experts, limited=True)
    assert_close(got, mixture.formula(x, weights, experts), 2 * CLOSE[t])
