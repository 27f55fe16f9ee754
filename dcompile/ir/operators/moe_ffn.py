"""A mixture of gated feed-forward networks, for rows that are routed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import Operator
from dcompile.ir.work import formulas

F = torch.nn.functional
# The place of an activation is its number in the kernels' ABI.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
}


def moe_ffn(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Each row's experts, weighted and added: y[r] = sum_j w[r, j] FFN_{e[r, j]}(x[r]).

    x [R, D], weights f32 [R, k], experts i32 [R, k], gate_up [E, 2F, D] (gate first), down [E, D, F].
    A slot of expert -1 is empty.
    """
    act = ACTIVATIONS[activation]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in [e for e in experts.unique().tolist() if e >= 0]:
        row, rank = (experts == e).nonzero(as_tuple=True)
        gate, up = F.linear(
            x[row], gate_up[e], None if gate_up_bias is None else gate_up_bias[e]
        ).chunk(2, -1)
        y = F.linear(act(gate) * up, down[e], None if down_bias is None else down_bias[e])
        out = out.index_put((row,), weights[row, rank, None] * y.float(), accumulate=True)
    return out.to(x.dtype)


registered = custom_op("dcompile::moe_ffn", moe_ffn, mutates_args=())


@registered.register_fake
def _(x, weights, experts, gate_up, down, gate_up_bias, down_bias, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def every_expert(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Every expert over every row, and of that what was chosen: shapes may not depend on the routing.

    In a window that is memory-bound this costs little, because its rows touch most experts anyway.
    """
    rows, count = x.shape[0], gate_up.shape[0]
    picked = experts.long()
    share = torch.zeros(rows, count).scatter(1, picked, weights).t()[:, :, None]
    chosen = (picked[:, :, None] == torch.arange(count)).any(1).t()[:, :, None]
    both = x.expand(count, -1, -1) @ gate_up.transpose(1, 2)
    if gate_up_bias is not None:
        both = both + gate_up_bias[:, None]
    gate, up = both.chunk(2, -1)
    y = (ACTIVATIONS[activation](gate) * up) @ down.transpose(1, 2)
    if down_bias is not None:
        y = y + down_bias[:, None]
    # Where an expert was not chosen, its overflow must not turn into no number.
    return torch.where(chosen, y.float() * share, 0.0).sum(0).to(x.dtype)


MOE_FFN = torch.ops.dcompile.moe_ffn.default
OPERATOR = Operator(MOE_FFN, moe_ffn, ("y",), formulas.moe_ffn, body=every_expert)
