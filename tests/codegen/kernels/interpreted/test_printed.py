"""Kernels printed from graphs give what torch gives, whatever runs of operators they are made of."""

from __future__ import annotations

from collections.abc import Callable

import interpreter  # first of all
import pytest
import torch
from check import run, small_program
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_plan import run_lowered
from torch import Tensor

from dcompile.codegen.cuda.lower import CudaLowered, lower

assert interpreter
F = torch.nn.functional


def check(
    fn: Callable[..., object],
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor] | None = None,
    tolerance: float = 1e-5,
) -> CudaLowered:
    """The plan of `fn`, run by the interpreter, beside `fn` in torch."""
    program = small_program(fn, inputs, weights)
    R = next(iter(inputs.values())).shape[0]
    tensors = {**inputs, **(weights or {})}
    wanted = [t.clone() for t in run(program, tensors)]
    lowered = lower(program, [90])
    assert all(item["where"] == "cuda" for item in lowered.plan["launches"])
    found = run_lowered(lowered, {**tensors, **program.constants}, R)
    for i, want in enumerate(wanted):
        got = found[f"out{i}"]
        assert got.dtype == want.dtype
        if want.dtype.is_floating_point:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(got, want)
    return lowered


def rows(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape), "y": torch.randn(*shape)}


def test_a_chain_with_a_reduction_is_one_kernel() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        total = (x * torch.sigmoid(y)).sum(-1, keepdim=True)
        return torch.where(x > total, x, y.exp() - total).amax(-1)

    assert len(check(fn, rows(5, 13)).launches) == 1


def test_ranks_compare_every_pair_in_registers() -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ahead = (x[:, None, :] > x[:, :, None]) | (y[:, None, :] == y[:, :, None])
        return ahead.sum(-1), ahead.any(-1) & ahead.all(-1).logical_not()

    assert len(check(fn, rows(3, 12)).launches) == 1


def test_rows_too_long_for_registers_are_walked() -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(x * 3.0 + y, -1)
        return p, (p * x).sum(-1)

    check(fn, rows(2, 9001))


@pytest.mark.parametrize("largest", [True, False])
def test_topk_with_equals_and_nan(largest: bool) -> None:
    x = torch.randint(0, 4, (5, 37)).float()
    x[0, 3] = x[2, 30] = torch.nan

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(x * 2.0, 6, -1, largest)
        # The order of equals is torch's own affair, so what stands there is compared.
        return values + 1.0, torch.gather(x, -1, indices)

    check(fn, {"x": x})


@pytest.mark.parametrize("descending", [True, False])
def test_a_stable_sort(descending: bool) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(x, dim=-1, descending=descending, stable=True)

    check(fn, {"x": torch.randint(0, 9, (4, 3, 40))})


def test_layer_norm_gelu_and_what_follows_a_product() -> None:
    weights = {"w": torch.randn(24), "b": torch.randn(24), "m": torch.randn(17, 24) * 0.2}

    def fn(x: Tensor, y: Tensor, w: Tensor, b: Tensor, m: Tensor) -> Tensor:
        normed = F.layer_norm(x, (24,), w, b, 1e-12)
        return F.gelu(F.linear(normed, m)) * torch.tanh(y[:, :17]) + 0.5

    lowered = check(fn, rows(6, 24), weights)
    names = [item.kernel for item in lowered.launches]
    assert sum(name.startswith("linear") for name in names) == 1
    assert any("gelu" in name for name in names if name.startswith("linear"))


def test_parts_views_and_permutations() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        heads = x.reshape(-1, 4, 6).permute(1, 0, 2)
        a, b = heads[..., :3], heads[..., 3:]
        turned = torch.cat((-b, a), -1) * y.reshape(-1, 4, 6).permute(1, 0, 2)
        return turned.permute(1, 0, 2).reshape(-1, 24)

    check(fn, rows(7, 24))


def test_integers_round_as_torch_rounds() -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        safe = torch.where(y == 0, 3, y)
        return x // safe, x % safe, (x.float() / 3).to(torch.int32)

    ints = {k: torch.randint(-9, 9, (6, 21)) for k in ("x", "y")}
    check(fn, ints)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(2, 5),  # export takes an axis of one for a constant
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1 << 30),
)
def test_any_width_and_dtype(R: int, n: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(R, n, generator=generator).to(dtype) for _ in range(2))

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = (x + y).clamp(-1.0, 1.0).pow(2) - torch.rsqrt(y.abs() + 0.5)
        return z, z.mean(-1), x.amax(-1) > y.amin(-1)

    # Rounded after every operator, as torch does it: bits differ only in the reductions.
    check(fn, {"x": x, "y": y}, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


def test_an_operator_without_a_kernel_is_named() -> None:
    from dcompile.errors import UnsupportedModel

    program = small_program(lambda x: torch.cumsum(x, -1), {"x": torch.randn(3, 5)})
    with pytest.raises(UnsupportedModel, match="cumsum"):
        lower(program, [90])
