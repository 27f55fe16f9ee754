"""A residual sum and its norm are one operator that gives both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check import check_pass, randn

from dcompile.passes.fuse_add_rms_norm import FuseAddRMSNorm


def test_fuses_a_residual_norm_and_keeps_the_sum() -> None:
    def residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + r
        return F.rms_norm(total, (8,), w, 1e-5), total

    check_pass(
        FuseAddRMSNorm(),
        residual,
        {"x": randn(5, 8), "r": randn(5, 8)},
        {"w": randn(8)},
        after="""
            v0: (f32[R, 8], f32[R, 8]) = dcompile.add_rms_norm(x, r, w, 1e-05)
            v1: f32[R, 8] = getitem(v0, 0)
            v2: f32[R, 8] = getitem(v0, 1)
            return (v2, v1)
        """,
    )


def test_leaves_a_norm_of_a_scaled_sum() -> None:
    def scaled(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.rms_norm(torch.add(x, r, alpha=2), (8,), w, 1e-5),)

    inputs = {"x": randn(5, 8), "r": randn(5, 8)}
    check_pass(FuseAddRMSNorm(), scaled, inputs, {"w": randn(8)}, places=0)
