"""The fused operators in ATen alone, without anything that depends on data: what a `.pt2` is compiled from.

`attend` and `moe_ffn` compute what their namesakes in `ir/ops.py` do, for rows that stand by sequence,
each with as many; the others are formulas of `ir/` as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dcompile.ir import formulas, ops, routing
from dcompile.ir.formulas import NEG_INF


def attend(
    q: Tensor, keys: Tensor, values: Tensor, row_seq: Tensor, row_limit: Tensor, scale: float
) -> Tensor:
    batch, length, groups, size = keys.shape
    heads = q.shape[1]
    asked = q.reshape(batch, -1, groups, heads // groups, size).permute(0, 2, 3, 1, 4).float()
    k = keys.permute(0, 2, 3, 1).unsqueeze(2).float()
    v = values.permute(0, 2, 1, 3).unsqueeze(2).float()
    seen = torch.arange(length) < row_limit.reshape(batch, 1, 1, -1, 1)
    scores = torch.where(seen, asked @ k * scale, NEG_INF)
    out = torch.softmax(scores, -1) @ v
    return out.permute(0, 3, 1, 2, 4).reshape(-1, heads, size).to(q.dtype)


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
    y = (formulas.ACTIVATIONS[activation](gate) * up) @ down.transpose(1, 2)
    if down_bias is not None:
        y = y + down_bias[:, None]
    # Where an expert was not chosen, its overflow must not turn into no number.
    return torch.where(chosen, y.float() * share, 0.0).sum(0).to(x.dtype)


choose_asked = partial(formulas.choose_asked, any_temperature=True)


def choose(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = pos.new_zeros((*pos.shape, 0))
    return choose_asked(logits, live, temperature, seed, tick, pos, nothing, mask_id)[:4]


BODIES: Mapping[object, Callable[..., object]] = {
    ops.WRITE_ROWS: formulas.write_rows,
    ops.ATTEND: attend,
    ops.ADD_RMS_NORM: formulas.add_rms_norm,
    ops.SILU_MUL: formulas.silu_mul,
    ops.NORM_ROPE_WRITE: formulas.norm_rope_write,
    ops.ROUTE: routing.route,
    ops.MOE_FFN: moe_ffn,
    ops.CHOOSE: choose,
    ops.CHOOSE_ASKED: choose_asked,
}
