"""A residual addition and the norm that reads it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import Operator
from dcompile.ir.work import formulas


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm along the last axis."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, r: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x + r, rms_norm(x + r)) along the last axis."""
    total = x + r
    return total, rms(total, weight, eps)


registered = custom_op("dcompile::add_rms_norm", add_rms_norm, mutates_args=())


@registered.register_fake
def _(x, r, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x)


ADD_RMS_NORM = torch.ops.dcompile.add_rms_norm.default
OPERATOR = Operator(
    ADD_RMS_NORM, add_rms_norm, ("total", "y"), formulas.add_rms_norm, body=add_rms_norm
)
