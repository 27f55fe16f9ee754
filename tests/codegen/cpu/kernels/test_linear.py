"""Matrix products with packed weights, at any shape."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import run_linear
from guards import CLOSE, TYPES, assert_close, few, guarded, rand
from hypothesis import given
from hypothesis import strategies as st
from native import Library

from dcompile.codegen import pack


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize(
    "R, N, K", [(1, 1, 1), (2, 33, 3), (13, 64, 511), (15, 37, 1025), (29, 96, 64), (64, 31, 513)]
)
def test_linear(lib: Library, t: str, R: int, N: int, K: int) -> None:
    x, w, bias, residual = rand(R, K, t=t), rand(N, K, t=t), rand(N, t=t), rand(R, N, t=t)
    product = x.double() @ w.double().T
    terms = x.double().abs() @ w.double().abs().T
    assert_close(run_linear(lib, t, x, w, None, None), product, CLOSE[t], terms)
    got = run_linear(lib, t, x, w, bias, residual)
    terms = terms + bias.double().abs() + residual.double().abs()
    assert_close(got, product + bias.double() + residual.double(), CLOSE[t], terms)


@few
@given(
    R=st.integers(1, 80), N=st.integers(1, 140), K=st.integers(1, 700), t=st.sampled_from([*TYPES])
)
def test_linear_any_shape(best: Library, R: int, N: int, K: int, t: str) -> None:
    torch.manual_seed(R + N + K)
    x, w = rand(R, K, t=t), rand(N, K, t=t)
    terms = x.double().abs() @ w.double().abs().T
    product = x.double() @ w.double().T
    assert_close(run_linear(best, t, x, w, None, None), product, CLOSE[t], terms)


# Weights of over 2 MiB: what is written goes past the caches, where the output's rows let it.
@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("R, N", [(1, 1088), (33, 1088), (48, 1090), (49, 1088), (70, 1104)])
def test_linear_of_large_weights(lib: Library, t: str, R: int, N: int) -> None:
    K = 1040
    x, w, bias, residual = rand(R, K, t=t), rand(N, K, t=t), rand(N, t=t), rand(R, N, t=t)
    terms = x.double().abs() @ w.double().abs().T + bias.double().abs() + residual.double().abs()
    wanted = x.double() @ w.double().T + bias.double() + residual.double()
    aligned = run_linear(lib, t, x, w, bias, residual)
    assert_close(aligned, wanted, CLOSE[t], terms)
    elsewhere = torch.full((R * N + 1,), math.nan, dtype=TYPES[t])[1:].view(R, N)
    packed = guarded(pack.pack_linear(w))
    lib.call(f"linear_{t}", elsewhere, x, packed, bias, residual, R, N, K)
    assert torch.equal(elsewhere, aligned)


def test_linear_of_no_rows(lib: Library) -> None:
    assert run_linear(lib, "f32", torch.empty(0, 8), torch.ones(4, 8), None, None).shape == (0, 4)


@pytest.mark.parametrize("t", TYPES)
def test_linear_of_many_rows(best: Library, t: str) -> None:
    x, w = rand(2500, 700, t=t), rand(70, 700, t=t)
    terms = x.double().abs() @ w.double().abs().T
    product = x.double() @ w.double().T
    assert_close(run_linear(best, t, x, w, None, None), product, CLOSE[t], terms)
