"""Packed weights: panels of 32 columns, K-major, bf16 in pairs, zeros where nothing is."""

from __future__ import annotations

import pytest
import torch

from dcompile.codegen import pack

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n, k", [(1, 1), (32, 4), (33, 7), (100, 65), (64, 512)])
def test_pack_linear(dtype: torch.dtype, n: int, k: int) -> None:
    w = torch.randn(n, k).to(dtype)
    packed = pack.pack_linear(w)
    pair = 2 if dtype == torch.bfloat16 else 1
    assert packed.dtype == dtype and packed.shape == (pack.packed_size(n, k, dtype),)
    panels = packed.view(-(-n // 32), -(-k // pair), 32, pair)
    row, column = n - 1, k - 1
    assert panels[row // 32, column // pair, row % 32, column % pair] == w[row, column]
    assert torch.equal(pack.unpack_linear(packed, n, k), w)
    assert packed.double().norm() == pytest.approx(float(w.double().norm()))  # the rest is zero


@pytest.mark.parametrize("dtype", TYPES)
def test_pack_experts_is_pack_linear_of_each(dtype: torch.dtype) -> None:
    w = torch.randn(3, 40, 9).to(dtype)
    assert torch.equal(pack.pack_experts(w), torch.cat([pack.pack_linear(e) for e in w]))


def test_pack_takes_a_view() -> None:
    w = torch.randn(9, 64).bfloat16().T
    assert torch.equal(pack.pack_linear(w), pack.pack_linear(w.contiguous()))
