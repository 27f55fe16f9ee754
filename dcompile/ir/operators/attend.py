"""Attention of any rows over the cached keys of their sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import NEG_INF, Operator
from dcompile.ir.work import formulas


def attend(
    q: Tensor, keys: Tensor, values: Tensor, row_seq: Tensor, row_limit: Tensor, scale: float
) -> Tensor:
    """q [R, H, K] attends to the first row_limit[r] keys of its slot; H is a multiple of G."""
    out = torch.zeros_like(q)
    groups = q.shape[1] // keys.shape[2]
    for slot in row_seq.unique().tolist():
        rows = (row_seq == slot).nonzero()[:, 0]
        limit = row_limit[rows]
        length = int(limit.max())
        k = keys[slot, :length].repeat_interleave(groups, 1).transpose(0, 1)
        v = values[slot, :length].repeat_interleave(groups, 1).transpose(0, 1)
        seen = torch.arange(length, device=q.device) < limit[:, None]
        scores = (q[rows].transpose(0, 1).float() @ k.float().transpose(1, 2)) * scale
        weights = torch.softmax(scores.masked_fill(~seen, NEG_INF), -1)
        out[rows] = (weights @ v.float()).transpose(0, 1).to(q.dtype)
    return out


registered = custom_op("dcompile::attend", attend, mutates_args=())


@registered.register_fake
def _(q, keys, values, row_seq, row_limit, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


def by_sequence(
    q: Tensor, keys: Tensor, values: Tensor, row_seq: Tensor, row_limit: Tensor, scale: float
) -> Tensor:
    """The same for rows that stand by sequence, each with as many."""
    batch, length, groups, size = keys.shape
    heads = q.shape[1]
    asked = q.reshape(batch, -1, groups, heads // groups, size).permute(0, 2, 3, 1, 4).float()
    k = keys.permute(0, 2, 3, 1).unsqueeze(2).float()
    v = values.permute(0, 2, 1, 3).unsqueeze(2).float()
    seen = torch.arange(length) < row_limit.reshape(batch, 1, 1, -1, 1)
    scores = torch.where(seen, asked @ k * scale, NEG_INF)
    out = torch.softmax(scores, -1) @ v
    return out.permute(0, 3, 1, 2, 4).reshape(-1, heads, size).to(q.dtype)


ATTEND = torch.ops.dcompile.attend.default
OPERATOR = Operator(ATTEND, attend, ("o",), formulas.attend, body=by_sequence)
