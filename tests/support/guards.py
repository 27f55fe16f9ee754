"""Every kernel is held against its formula in float64.

Outputs are filled with NaN and stand between canaries, so a kernel that leaves a hole or writes
beside its output is found out; inputs end in NaN, so reading beyond them shows.
"""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, settings

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CLOSE = {"f32": 1e-6, "bf16": 5e-3, "f16": 1e-3}

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Out:
    """An output full of NaN (or -77) with canaries on both sides."""

    PAD = 64

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        n = math.prod(shape)
        self._whole = torch.full((n + 2 * self.PAD,), 99, dtype=dtype)
        self.tensor = self._whole[self.PAD : self.PAD + n].view(shape)
        self.tensor.fill_(math.nan if dtype.is_floating_point else -77)

    def check(self) -> torch.Tensor:
        assert (self._whole[: self.PAD] == 99).all()
        assert (self._whole[-self.PAD :] == 99).all()
        return self.tensor


def guarded(x: torch.Tensor) -> torch.Tensor:
    """Return x followed by NaN: reading beyond it shows."""
    whole = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype)
    whole[: x.numel()] = x.flatten()
    return whole[: x.numel()].view(x.shape)


def rand(*shape: int, t: str, scale: float = 1.0) -> torch.Tensor:
    return guarded((torch.randn(shape) * scale).to(TYPES[t]))


def assert_close(
    got: torch.Tensor, want: torch.Tensor, limit: float, terms: torch.Tensor | None = None
) -> None:
    """Compare norms; against the size of the terms of a sum, where so few values may cancel."""
    assert got.isfinite().all()
    if got.numel() < 16:
        limit *= 8  # a handful of values may all be small by cancellation
    size = (want if terms is None else terms).norm().clamp(min=1e-30)
    error = (got.double() - want).norm() / size
    assert error <= limit, f"{error:.2e} > {limit:.0e}"
