"""Relative error against a float64 reference."""

from __future__ import annotations

import torch

CLOSE = {"f32": 2e-6, "bf16": 6e-3, "f16": 1e-3}


def assert_close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    """Compare norms; a handful of values may all be small by cancellation."""
    assert got.isfinite().all()
    limit *= 8 if got.numel() < 16 else 1
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error <= limit, f"{error:.2e} > {limit:.0e}"
