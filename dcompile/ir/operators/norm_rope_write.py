"""What stands between the projection of queries, keys and values and the attention over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.add_rms_norm import rms
from dcompile.ir.operators.base import Operator
from dcompile.ir.work import formulas


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rot of x [R, H, K] by tables [R, rot], halves paired (RoFormer, half split)."""
    rot = cos.shape[-1]
    head, tail = x[..., :rot].float(), x[..., rot:]
    a, b = head.chunk(2, -1)
    turned = head * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), tail), -1)


def norm_rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    row_seq: Tensor,
    row_pos: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-head norm (where given), rotary embedding, and K/V rows written at their places.

    qkv [R, (H + 2 G) K], cos and sin f32 [L, rot] -> q [R, H, K], keys and values [N, L, G, K].
    """
    groups, size = keys.shape[2], keys.shape[3]
    rows = qkv.reshape(-1, heads + 2 * groups, size)
    q, k, v = rows.split([heads, groups, groups], 1)
    if q_norm is not None:
        q = rms(q, q_norm, eps)
    if k_norm is not None:
        k = rms(k, k_norm, eps)
    q, k = (rotate(x, cos[row_pos], sin[row_pos]) for x in (q, k))
    place = (row_seq, row_pos)
    return q.contiguous(), keys.index_put(place, k), values.index_put(place, v)


registered = custom_op("dcompile::norm_rope_write", norm_rope_write, mutates_args=())


@registered.register_fake
def _(qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads, eps):  # type: ignore[no-untyped-def]
    q = qkv.new_empty((row_seq.shape[0], heads, keys.shape[3]))
    return q, torch.empty_like(keys), torch.empty_like(values)


NORM_ROPE_WRITE = torch.ops.dcompile.norm_rope_write.default
OPERATOR = Operator(
    NORM_ROPE_WRITE,
    norm_rope_write,
    ("q", "new_keys", "new_values"),
    formulas.norm_rope_write,
    body=norm_rope_write,
)
