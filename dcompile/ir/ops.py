"""The fused operators: what each means, as a reference body that runs on any machine.

A pass puts them into the graph, code generation maps them to kernels, `check` and the tests run the
bodies.  R rows, B sequences, n block length, D hidden size, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir import formulas, routing
from dcompile.ir.formulas import NEG_INF


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
    return formulas.choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id)[:4]


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
    return formulas.choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id)


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
    return formulas.add_rms_norm(x, r, weight, eps)


@add_rms_norm.register_fake
def _(x, r, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x)


@custom_op("dcompile::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return formulas.silu_mul(gate, up)


@silu_mul.register_fake
def _(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


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
    return formulas.norm_rope_write(
        qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads, eps
    )


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
    return routing.route(logits, bias, top_k, score, groups, kept_groups, renormalize, scale)


@route.register_fake
def _(logits, bias, top_k, score, groups, kept_groups, renormalize, scale):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    weights = logits.new_empty((rows, top_k), dtype=torch.float32)
    return weights, logits.new_empty((rows, top_k), dtype=torch.int32)


ACTIVATIONS = tuple(formulas.ACTIVATIONS)


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
    act = formulas.ACTIVATIONS[activation]
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
