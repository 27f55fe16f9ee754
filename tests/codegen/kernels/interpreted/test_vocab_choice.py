"""The choice of tokens against the operator's reference, and its noise against the specification."""

from __future__ import annotations

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import TYPES, poisoned, run

from dcompile.codegen.kernels import vocab_choice
from dcompile.codegen.kernels.noise import gumbel, noise_key
from dcompile.codegen.triton.tiles import Tiles
from dcompile.ir import operators
from dcompile.ir.operators import noise

assert interpreter
RESULTS = ("token", "confidence", "margin", "entropy")
TOLD = ("choice_score", "probability", "score")


@triton.jit
def draw(out, seed, tick, pos, V: tl.constexpr):
    row = tl.arange(0, 2)
    v = tl.arange(0, V)
    key = noise_key(tl.load(seed + row), tl.load(tick + row), tl.load(pos + row))
    tl.store(out + row[:, None] * V + v[None, :], gumbel(key[:, None], v[None, :]))


def test_the_noise_is_the_hash_of_the_specification() -> None:
    seed, tick = torch.tensor([2**40 + 12345, -7]), torch.tensor([3, 2**33 + 1])
    pos, out = torch.tensor([77, 100000]), torch.empty(2, 4096)
    draw[(1,)](out, seed, tick, pos, V=4096)
    want = noise.gumbel(seed, tick, pos, 4096)
    assert torch.allclose(out, want, rtol=2e-6, atol=2e-6)


def choose(
    t: str, given: dict[str, torch.Tensor], mask: int, splits: int
) -> dict[str, torch.Tensor]:
    B, n, D = given["x"].shape
    got = {name: poisoned(B, n, dtype=torch.float32) for name in RESULTS}
    got["token"] = poisoned(B, n, dtype=torch.int64)
    lowering = vocab_choice.launches(
        **{"sequences": {"B": 1}, "length": n, "hidden": D, "vocab": len(given["w"])},
        **{"mask_id": mask, "dtype": t, "arch": 90, "bias": given.get("bias") is not None},
        tiles=Tiles(16, 32, 32, splits=splits, stages=1),
    )
    run(lowering, {**got, **given}, B=B)
    return got


def inputs(t: str, B: int, n: int, D: int, V: int, whole: bool) -> dict[str, torch.Tensor]:
    """Integers where the logits must be exact."""
    draw_x = torch.randint(-3, 4, (B, n, D)) if whole else torch.randn(B, n, D) * 2
    draw_w = torch.randint(-1, 2, (V, D)) if whole else torch.randn(V, D) * D**-0.5
    return {
        **{"x": draw_x.to(TYPES[t]), "w": draw_w.to(TYPES[t])},
        **{"live": torch.rand(B, n) < 0.7, "temperature": torch.zeros(B)},
        **{"seed": torch.randint(2**40, (B,)), "tick": torch.randint(9, (B,))},
        "pos": torch.randint(1000, (B, n)),
    }


def reference(given: dict[str, torch.Tensor], mask: int) -> dict[str, torch.Tensor]:
    names = ("live", "temperature", "seed", "tick", "pos")
    logits = torch.nn.functional.linear(given["x"].double(), given["w"].double())
    if given.get("bias") is not None:
        logits = logits + given["bias"].double()
    logits = logits.to(given["x"].dtype)
    return dict(
        zip(RESULTS, operators.CHOOSE(logits, *(given[n] for n in names), mask), strict=True)
    )


def check(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    assert torch.equal(got["token"], want["token"])
    for name in RESULTS[1:]:
        assert torch.allclose(got[name], want[name], rtol=limit, atol=limit), name


@pytest.mark.parametrize("t", ["f32", "bf16"])
@pytest.mark.parametrize(("V", "splits"), [(70, 2), (129, 3), (2, 1)])
def test_greedy(t: str, V: int, splits: int) -> None:
    given = inputs(t, 2, 5, 33, V, whole=True)
    given["bias"] = torch.randint(-2, 3, (V,)).to(TYPES[t])
    check(choose(t, given, 1, splits), reference(given, 1))


def test_temperatures_of_each_sequence() -> None:
    given = inputs("f32", 3, 4, 24, 70, whole=False)
    given["temperature"] = torch.tensor([0.0, 0.7, 3.0])
    given["live"][:] = True
    check(choose("f32", given, 69, 2), reference(given, 69))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, -float("inf")]), min_size=40, max_size=40),
    mask=st.integers(0, 39),
)
def test_ties_and_the_mask(logits: list[float], mask: int) -> None:
    """Logits given as a bias: ties go to the lowest id, the mask id never wins."""
    given = inputs("f32", 1, 3, 8, 40, whole=True)
    given["x"].zero_()
    given["live"][:] = True
    given["bias"] = torch.tensor(logits)
    if given["bias"].isinf().all():
        given["bias"][mask] = 0.0
    check(choose("f32", given, mask, 2), reference(given, mask))


def test_where_only_the_mask_is_possible_the_first_other_id_stands_in() -> None:
    given = inputs("f32", 1, 2, 8, 40, whole=True)
    given["x"].zero_()
    given["live"][:] = True
    given["bias"] = torch.full((40,), -torch.inf)
    given["bias"][0] = 1.0
    for temperature in (0.0, 1.0):
        given["temperature"][:] = temperature
        check(choose("f32", given, 0, 2), reference(given, 0))


@pytest.mark.parametrize("t", ["f32", "bf16"])
@pytest.mark.parametrize("S", [1, 5])
def test_what_is_told_of_tokens_asked_about(t: str, S: int) -> None:
    B, n, V, mask = 2, 3, 70, 69
    given = inputs(t, B, n, 33, V, whole=True)
    given["temperature"] = torch.tensor([0.0, 0.8])
    given["asked"] = torch.randint(V, (B, n, S))
    given["asked"][0, 0, 0] = mask
    got = {name: poisoned(B, n, dtype=torch.float32) for name in (*RESULTS, "choice_score")}
    got |= {name: poisoned(B, n, S, dtype=torch.float32) for name in TOLD[1:]}
    got["token"] = poisoned(B, n, dtype=torch.int64)
    lowering = vocab_choice.launches(
        **{"sequences": {"B": 1}, "length": n, "hidden": 33, "vocab": V, "asked": S},
        **{"mask_id": mask, "dtype": t, "arch": 90},
        tiles=Tiles(16, 32, 32, splits=2, stages=1),
    )
    run(lowering, {**got, **given}, B=B)
    logits = torch.nn.functional.linear(given["x"].double(), given["w"].double())
    names = ("live", "temperature", "seed", "tick", "pos", "asked")
    made = operators.CHOOSE_ASKED(logits.to(TYPES[t]), *(given[n] for n in names), mask)
    want = dict(zip((*RESULTS, *TOLD), made, strict=True))
    check(got, want)
    for name in TOLD:
        assert torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-5), name
