"""What the fused operators compute, where plain torch without a choice by data says it.

`ir/ops.py` registers them as operators, `export/bodies.py` puts them into a `.pt2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dcompile.ir.noise import gumbel

F = torch.nn.functional
NEG_INF = float("-inf")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
}


def write_rows(cache: Tensor, rows: Tensor, row_seq: Tensor, row_pos: Tensor) -> Tensor:
    return cache.index_put((row_seq, row_pos), rows)


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rot of x [R, H, K] by tables [R, rot], halves paired (RoFormer, half split)."""
    rot = cos.shape[-1]
    head, tail = x[..., :rot].float(), x[..., rot:]
    a, b = head.chunk(2, -1)
    turned = head * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), tail), -1)


def add_rms_norm(x: Tensor, r: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x + r
    return total, rms(total, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


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


def choose_asked(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    asked: Tensor,
    mask_id: int,
    *,
    any_temperature: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `ops.choose_asked`.  With `any_temperature` the noise is computed without asking for its need."""
    batch, length, vocab_size = logits.shape
    z = logits.reshape(-1, vocab_size).float()
    z = torch.where(z.isnan(), NEG_INF, z)
    p = torch.softmax(z, -1)
    log_p = torch.log_softmax(z, -1)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    is_mask = torch.arange(vocab_size, device=z.device) == mask_id
    without = z.masked_fill(is_mask, NEG_INF)

    def spread(row: Tensor) -> Tensor:
        return row[:, None].expand(batch, length).reshape(-1)

    t = spread(temperature)
    score = without
    if any_temperature or bool((t > 0).any()):
        noise = gumbel(spread(seed), spread(tick), pos.reshape(-1), vocab_size)
        noisy = without / torch.where(t > 0, t, 1.0)[:, None] + noise
        score = torch.where((t > 0)[:, None], noisy, without)
    # A row of nothing but the mask token would choose it: the first other id stands in.
    floor = torch.finfo(torch.float32).min
    token = torch.where(is_mask, NEG_INF, score.clamp_min(floor)).argmax(-1)
    confidence = p.gather(-1, token[:, None])[:, 0]
    best = p.masked_fill(is_mask, 0.0).topk(2, -1).values
    margin = best[:, 0] - best[:, 1]
    of = asked.flatten(0, 1)
    on = live.reshape(-1)

    def put(x: Tensor, off: float) -> Tensor:
        # Of infinite logits no probability is a number; a policy has to go on all the same.
        x = torch.where(x.isnan(), 0.0, x) if x.is_floating_point() else x
        dead = on if x.dim() == 1 else on[:, None]
        return torch.where(dead, x, off).reshape(batch, length, *x.shape[1:])

    return (
        put(token, -1),
        put(confidence, NEG_INF),
        put(margin, NEG_INF),
        put(entropy, 0.0),
        put(score.gather(-1, token[:, None])[:, 0], NEG_INF),
        put(p.gather(-1, of), 0.0),
        put(score.gather(-1, of), NEG_INF),
    )
