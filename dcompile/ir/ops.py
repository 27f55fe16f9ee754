"""The fused operators: what each means, as a reference body that runs on any machine.

A pass puts them into the graph, code generation maps them to kernels, `check` and the tests run the
bodies.  R rows, B sequences, n block length, D hidden size, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.routing import best, scores, shares

NEG_INF = float("-inf")
MASK32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (lowbias32) on int64 values below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def _key(seed: Tensor, tick: Tensor, pos: Tensor) -> Tensor:
    high = (seed >> 32) & MASK32
    key = _mix((seed & MASK32) ^ _mix(high))
    key = _mix(key ^ (tick & MASK32))
    return _mix((key + pos * 0x9E3779B9) & MASK32)


def uniform(seed: Tensor, tick: Tensor, pos: Tensor) -> Tensor:
    """f32 in (0, 1) of the broadcast shape, by request, iteration and position; no token's noise."""
    return ((_mix(_key(seed, tick, pos) ^ 0x5BD1E995) >> 9).float() + 0.5) * 2.0**-23


def gumbel(seed: Tensor, tick: Tensor, pos: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise f32 [C, V] that depends on nothing but request, iteration, position, token."""
    key = _key(seed, tick, pos)
    token = torch.arange(vocab_size, device=pos.device)
    u = _mix((key[:, None] + token * 0x85EBCA6B) & MASK32)
    uniform = ((u >> 8).double() + 0.5) * 2.0**-24
    return (-torch.log(-torch.log(uniform))).float()


@custom_op("dcompile::choose", mutates_args=())
def choose(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, confidence, margin and negative entropy's opposite for each live position.

    logits [B, n, V] -> token i64, confidence f32, margin f32, entropy f32, each [B, n].  The token is
    the best but for the mask id (lowest id on a tie), with temperature t > 0 the best of
    logits / t + Gumbel noise.  confidence = softmax(logits)[token].
    """
    asked = torch.zeros(*live.shape, 0, dtype=torch.int64, device=live.device)
    return _choose(logits, live, temperature, seed, tick, pos, asked, mask_id)[:4]


@custom_op("dcompile::choose_asked", mutates_args=())
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
    """`choose`, and what the model says of the tokens `asked` [B, n, S].

    After the four of `choose`: the token's score [B, n], the asked tokens' probabilities and scores
    [B, n, S], all f32.  A score is the logit, at a temperature t > 0 logit / t + Gumbel noise, for the
    mask id -inf.
    """
    return _choose(logits, live, temperature, seed, tick, pos, asked, mask_id)


def _choose(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    asked: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    if bool((t > 0).any()):
        noise = gumbel(spread(seed), spread(tick), pos.reshape(-1), vocab_size)
        noisy = without / torch.where(t > 0, t, 1.0)[:, None] + noise
        score = torch.where((t > 0)[:, None], noisy, without)
    # A row of nothing but the mask token would choose it: the first other id stands in.
    floor = torch.finfo(torch.float32).min
    token = torch.where(is_mask, NEG_INF, score.clamp_min(floor)).argmax(-1)
    confidence = p.gather(-1, token[:, None])[:, 0]
    best = p.masked_fill(is_mask, 0.0).topk(2, -1).values
    margin = best[:, 0] - best[:, 1]
    of = asked.reshape(len(z), -1)
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


def _choice_like(live: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token = live.new_empty(live.shape, dtype=torch.int64)
    number = live.new_empty(live.shape, dtype=torch.float32)
    return token, number, torch.empty_like(number), torch.empty_like(number)


def _asked_like(live: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
    number = asked.new_empty(asked.shape, dtype=torch.float32)
    one = live.new_empty(live.shape, dtype=torch.float32)
    return *_choice_like(live), one, number, torch.empty_like(number)


@choose.register_fake
def _(logits, live, temperature, seed, tick, pos, mask_id):  # type: ignore[no-untyped-def]
    return _choice_like(live)


@choose_asked.register_fake
def _(logits, live, temperature, seed, tick, pos, asked, mask_id):  # type: ignore[no-untyped-def]
    return _asked_like(live, asked)


@custom_op("dcompile::vocab_choice", mutates_args=())
def vocab_choice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`choose` of the vocabulary projection: x [B, n, D], weight [V, D]; logits are never stored."""
    logits = torch.nn.functional.linear(x, weight, bias)
    return choose(logits, live, temperature, seed, tick, pos, mask_id)


@vocab_choice.register_fake
def _(x, weight, bias, live, temperature, seed, tick, pos, mask_id):  # type: ignore[no-untyped-def]
    return _choice_like(live)


@custom_op("dcompile::vocab_choice_asked", mutates_args=())
def vocab_choice_asked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    asked: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`choose_asked` of the vocabulary projection: x [B, n, D], weight [V, D], asked [B, n, S]."""
    logits = torch.nn.functional.linear(x, weight, bias)
    return choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id)  # type: ignore


@vocab_choice_asked.register_fake
def _(x, weight, bias, live, temperature, seed, tick, pos, asked, mask_id):  # type: ignore[no-untyped-def]
    return _asked_like(live, asked)


@custom_op("dcompile::soft_embed", mutates_args=())
def soft_embed(logits: Tensor, table: Tensor, live: Tensor, weight: Tensor) -> Tensor:
    """weight[r] * softmax(logits[r]) @ table for live rows, 0 elsewhere.

    logits [R, V], table [V, E], live bool [R], weight f32 [R] -> [R, E] of the table's dtype; the
    product in float32, rounded once.
    """
    z = logits.float()
    p = torch.softmax(torch.where(z.isnan(), NEG_INF, z), -1)
    p = torch.where(p.isnan(), 0.0, p)
    # A table may have more rows than the model has logits.
    mixed = weight[:, None] * (p @ table[: p.shape[1]].float())
    return torch.where(live[:, None], mixed, 0.0).to(table.dtype)


@soft_embed.register_fake
def _(logits, table, live, weight):  # type: ignore[no-untyped-def]
    return table.new_empty((weight.shape[0], table.shape[1]))


@custom_op("dcompile::vocab_soft_embed", mutates_args=())
def vocab_soft_embed(
    x: Tensor,
    head: Tensor,
    bias: Tensor | None,
    table: Tensor,
    live: Tensor,
    weight: Tensor,
) -> Tensor:
    """`soft_embed` of the vocabulary projection: x [R, D], head [V, D]; logits are never stored."""
    logits = torch.nn.functional.linear(x, head, bias)
    return soft_embed(logits, table, live, weight)  # type: ignore[no-any-return]


@vocab_soft_embed.register_fake
def _(x, head, bias, table, live, weight):  # type: ignore[no-untyped-def]
    return table.new_empty((weight.shape[0], table.shape[1]))


@custom_op("dcompile::write_rows", mutates_args=())
def write_rows(cache: Tensor, rows: Tensor, row_seq: Tensor, row_pos: Tensor) -> Tensor:
    """cache [N, L, G, K] with rows [R, G, K] at [row_seq, row_pos]."""
    return cache.index_put((row_seq, row_pos), rows)


@write_rows.register_fake
def _(cache, rows, row_seq, row_pos):  # type: ignore[no-untyped-def]
    return torch.empty_like(cache)


@custom_op("dcompile::attend", mutates_args=())
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


@attend.register_fake
def _(q, keys, values, row_seq, row_limit, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


@custom_op("dcompile::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, r: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(x + r, rms_norm(x + r)) along the last axis."""
    total = x + r
    return total, torch.nn.functional.rms_norm(total, (total.shape[-1],), weight, eps)


@add_rms_norm.register_fake
def _(x, r, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x)


@custom_op("dcompile::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


@silu_mul.register_fake
def _(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rot of x [R, H, K] by tables [R, rot], halves paired (RoFormer, half split)."""
    rot = cos.shape[-1]
    head, tail = x[..., :rot].float(), x[..., rot:]
    a, b = head.chunk(2, -1)
    turned = head * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), tail), -1)


@custom_op("dcompile::norm_rope_write", mutates_args=())
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
        q = _rms(q, q_norm, eps)
    if k_norm is not None:
        k = _rms(k, k_norm, eps)
    q, k = (rotate(x, cos[row_pos], sin[row_pos]) for x in (q, k))
    place = (row_seq, row_pos)
    return q.contiguous(), keys.index_put(place, k), values.index_put(place, v)


@norm_rope_write.register_fake
def _(qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads, eps):  # type: ignore[no-untyped-def]
    q = qkv.new_empty((row_seq.shape[0], heads, keys.shape[3]))
    return q, torch.empty_like(keys), torch.empty_like(values)


# By what experts are chosen, and what they are weighted with; the place is the number in the ABI.
SCORES = ("softmax", "sigmoid", "softmax_chosen", "sigmoid_by_logits", "softmax_by_logits")


@custom_op("dcompile::route", mutates_args=())
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
    """logits [R, E] -> weights f32 [R, k], experts i32 [R, k], best first, ties to the lowest index.

    score "softmax" over all experts or "sigmoid": chosen by score (+ bias); "softmax_by_logits" and
    "sigmoid_by_logits" are weighted by the same scores, "softmax_chosen" by a softmax over the chosen
    experts only, and chosen by the logits (+ bias), which stay apart where scores round to one value.
    By group where groups > 1 (a group's score is the sum of its two best; the best kept_groups stay).
    NaN counts as lowest.
    """
    s, keys = scores(logits, bias, score, groups, kept_groups)
    chosen = best(keys, top_k)
    share = shares(logits, s, chosen, score, renormalize, scale)
    return share.gather(-1, chosen), chosen.to(torch.int32)


@route.register_fake
def _(logits, bias, top_k, score, groups, kept_groups, renormalize, scale):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    weights = logits.new_empty((rows, top_k), dtype=torch.float32)
    return weights, logits.new_empty((rows, top_k), dtype=torch.int32)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@custom_op("dcompile::moe_ffn", mutates_args=())
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
    F = torch.nn.functional
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
    }[activation]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in [e for e in experts.unique().tolist() if e >= 0]:
        row, rank = (experts == e).nonzero(as_tuple=True)
        gate, up = F.linear(
            x[row], gate_up[e], None if gate_up_bias is None else gate_up_bias[e]
        ).chunk(2, -1)
        y = F.linear(act(gate) * up, down[e], None if down_bias is None else down_bias[e])
        out = out.index_put((row,), weights[row, rank, None] * y.float(), accumulate=True)
    return out.to(x.dtype)


@moe_ffn.register_fake
def _(x, weights, experts, gate_up, down, gate_up_bias, down_bias, activation):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


# The operators as they stand in a graph.
CHOOSE = torch.ops.dcompile.choose.default
VOCAB_CHOICE = torch.ops.dcompile.vocab_choice.default
CHOOSE_ASKED = torch.ops.dcompile.choose_asked.default
VOCAB_CHOICE_ASKED = torch.ops.dcompile.vocab_choice_asked.default
SOFT_EMBED = torch.ops.dcompile.soft_embed.default
VOCAB_SOFT_EMBED = torch.ops.dcompile.vocab_soft_embed.default
WRITE_ROWS = torch.ops.dcompile.write_rows.default
ATTEND = torch.ops.dcompile.attend.default
ADD_RMS_NORM = torch.ops.dcompile.add_rms_norm.default
SILU_MUL = torch.ops.dcompile.silu_mul.default
NORM_ROPE_WRITE = torch.ops.dcompile.norm_rope_write.default
ROUTE = torch.ops.dcompile.route.default
MOE_FFN = torch.ops.dcompile.moe_ffn.default
