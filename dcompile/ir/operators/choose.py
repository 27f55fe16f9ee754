"""The choice of a token for each live position, and what the model says of tokens asked about."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import NEG_INF, Operator
from dcompile.ir.operators.noise import gumbel
from dcompile.ir.work import formulas

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
RESULTS = ("token", "confidence", "margin", "entropy")
ASKED_RESULTS = (*RESULTS, "score", "asked_p", "asked_score")


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
    asked = pos.new_zeros((*pos.shape, 0))
    return choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id)[:4]


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
    sampled = bool((temperature > 0).any())
    return decide(logits, live, temperature, seed, tick, pos, asked, mask_id, sampled=sampled)


def decide(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    seed: Tensor,
    tick: Tensor,
    pos: Tensor,
    asked: Tensor,
    mask_id: int,
    *,
    sampled: bool,
) -> Seven:
    """As `choose_asked`; noise is computed where `sampled` says that some temperature may need it."""
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
    if sampled:
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


def four_like(live: Tensor) -> Four:
    """Empty results of `choose`."""
    token = live.new_empty(live.shape, dtype=torch.int64)
    number = live.new_empty(live.shape, dtype=torch.float32)
    return token, number, torch.empty_like(number), torch.empty_like(number)


def seven_like(live: Tensor, asked: Tensor) -> Seven:
    """Empty results of `choose_asked`."""
    number = asked.new_empty(asked.shape, dtype=torch.float32)
    one = live.new_empty(live.shape, dtype=torch.float32)
    return *four_like(live), one, number, torch.empty_like(number)


plain = custom_op("dcompile::choose", choose, mutates_args=())
with_asked = custom_op("dcompile::choose_asked", choose_asked, mutates_args=())


@plain.register_fake
def _(logits, live, temperature, seed, tick, pos, mask_id):  # type: ignore[no-untyped-def]
    return four_like(live)


@with_asked.register_fake
def _(logits, live, temperature, seed, tick, pos, asked, mask_id):  # type: ignore[no-untyped-def]
    return seven_like(live, asked)


# Whether there is a temperature is data; with it always there, nothing depends on that.
always_sampled = partial(decide, sampled=True)


def always_sampled_four(*given: Tensor) -> Four:
    *clock, pos, mask_id = given
    nothing = pos.new_zeros((*pos.shape, 0))
    return always_sampled(*clock, pos, nothing, mask_id)[:4]  # type: ignore[arg-type]


CHOOSE = torch.ops.dcompile.choose.default
CHOOSE_ASKED = torch.ops.dcompile.choose_asked.default
OPERATOR = Operator(CHOOSE, choose, RESULTS, formulas.choose, body=always_sampled_four)
ASKED = Operator(CHOOSE_ASKED, choose_asked, ASKED_RESULTS, formulas.choose, body=always_sampled)
