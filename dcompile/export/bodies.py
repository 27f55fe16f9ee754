"""The fused operators in ATen alone, without anything that depends on data: what a `.pt2` is compiled from.

Each computes what its namesake in `ir/ops.py` does, for rows that stand by sequence, each with as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dcompile.ir import ops, routing
from dcompile.ir.ops import NEG_INF, gumbel, rotate

F = torch.nn.functional


def write_rows(cache: Tensor, rows: Tensor, row_seq: Tensor, row_pos: Tensor) -> Tensor:
    return cache.index_put((row_seq, row_pos), rows)


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


def add_rms_norm(x: Tensor, r: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x + r
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


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
    q, k, v = rows[:, :heads], rows[:, heads : heads + groups], rows[:, heads + groups :]
    if q_norm is not None:
        q = F.rms_norm(q, (size,), q_norm, eps)
    if k_norm is not None:
        k = F.rms_norm(k, (size,), k_norm, eps)
    q, k = (rotate(x, cos[row_pos], sin[row_pos]) for x in (q, k))
    place = (row_seq, row_pos)
    return q.contiguous(), keys.index_put(place, k), values.index_put(place, v)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    kept_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `ops.route`, whose parts are plain torch already."""
    s, keys = routing.scores(logits, bias, score, groups, kept_groups)
    chosen = routing.best(keys, top_k)
    share = routing.shares(logits, s, chosen, score, renormalize, scale)
    return share.gather(-1, chosen), chosen.to(torch.int32)


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


def choose_asked(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    asked: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `ops.choose_asked`; the noise is computed whether a temperature asks for it or not."""
    batch, length, vocab_size = logits.shape
    z = logits.reshape(-1, vocab_size).float()
    z = torch.where(z.isnan(), NEG_INF, z)
    p = torch.softmax(z, -1)
    entropy = -torch.where(p > 0, p * torch.log_softmax(z, -1), 0.0).sum(-1)
    is_mask = torch.arange(vocab_size) == mask_id
    without = torch.where(is_mask, NEG_INF, z)

    def spread(row: Tensor) -> Tensor:
        return row[:, None].expand(batch, length).reshape(-1)

    t = spread(temperature)
    noise = gumbel(spread(seed), spread(tick), pos.reshape(-1), vocab_size)
    warm = (t > 0)[:, None]
    score = torch.where(warm, without / torch.where(warm, t[:, None], 1.0) + noise, without)
    floor = torch.finfo(torch.float32).min
    token = torch.where(is_mask, NEG_INF, score.clamp_min(floor)).argmax(-1)
    best = torch.where(is_mask, 0.0, p).topk(2, -1).values
    of = asked.reshape(batch * length, -1) if asked.shape[-1] else asked.new_zeros((z.shape[0], 0))
    on = live.reshape(-1)

    def put(x: Tensor, off: float) -> Tensor:
        x = torch.where(x.isnan(), 0.0, x) if x.is_floating_point() else x
        dead = on if x.dim() == 1 else on[:, None]
        return torch.where(dead, x, off).reshape(batch, length, *x.shape[1:])

    return (
        put(token, -1),
        put(p.gather(-1, token[:, None])[:, 0], NEG_INF),
        put(best[:, 0] - best[:, 1], NEG_INF),
        put(entropy, 0.0),
        put(score.gather(-1, token[:, None])[:, 0], NEG_INF),
        put(p.gather(-1, of), 0.0),
        put(score.gather(-1, of), NEG_INF),
    )


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
    ops.WRITE_ROWS: write_rows,
    ops.ATTEND: attend,
    ops.ADD_RMS_NORM: add_rms_norm,
    ops.SILU_MUL: silu_mul,
    ops.NORM_ROPE_WRITE: norm_rope_write,
    ops.ROUTE: route,
    ops.MOE_FFN: moe_ffn,
    ops.CHOOSE: choose,
    ops.CHOOSE_ASKED: choose_asked,
}
