"""silu(gate) * up: the gate of a gated FFN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import Operator
from dcompile.ir.work import formulas


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


registered = custom_op("dcompile::silu_mul", silu_mul, mutates_args=())


@registered.register_fake
def _(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


SILU_MUL = torch.ops.dcompile.silu_mul.default
OPERATOR = Operator(SILU_MUL, silu_mul, ("y",), formulas.silu_mul, body=silu_mul)
