"""Which experts a row takes, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import NEG_INF, Operator
from dcompile.ir.work import formulas

# By what experts are chosen, and what they are weighted with; the place is the number in the ABI.
SCORES = ("softmax", "sigmoid", "softmax_chosen", "sigmoid_by_logits", "softmax_by_logits")


def scores(
    logits: Tensor, bias: Tensor | None, score: str, groups: int, kept_groups: int
) -> tuple[Tensor, Tensor]:
    """(what weighs, what ranks) the experts: f32 [R, E] each; -inf is never chosen before a number."""
    z = logits.float()
    s = torch.sigmoid(z) if score.startswith("sigmoid") else torch.softmax(z, -1)
    keys = s if score in ("softmax", "sigmoid") else z
    keys = keys if bias is None else keys + bias.float()
    keys = torch.where(keys.isnan(), NEG_INF, keys)
    rows, experts = keys.shape
    if groups > 1:
        grouped = keys.reshape(rows, groups, experts // groups)
        group_score = grouped.topk(min(2, experts // groups), -1).values.sum(-1)
        kept = torch.argsort(-group_score, dim=-1, stable=True)[:, :kept_groups]
        keep = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, kept, True)
        keys = grouped.masked_fill(~keep[:, :, None], NEG_INF).reshape(rows, experts)
    return s, keys


def best(keys: Tensor, count: int) -> Tensor:
    """Indices of the greatest along the last axis, greatest first, ties to the lowest."""
    return torch.argsort(-keys, dim=-1, stable=True)[..., :count]


def shares(
    logits: Tensor, s: Tensor, chosen: Tensor, score: str, renormalize: bool, scale: float
) -> Tensor:
    """The weight [R, E] that each expert would have, by the divisor of the chosen [R, k]."""
    if score == "softmax_chosen":
        z = logits.float()
        top = z.gather(-1, chosen).amax(-1, keepdim=True)
        s = torch.exp(z - top)
        s = s / s.gather(-1, chosen).sum(-1, keepdim=True)
    if renormalize:
        s = s / (s.gather(-1, chosen).sum(-1, keepdim=True) + 1e-20)
    return s * scale


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


registered = custom_op("dcompile::route", route, mutates_args=())


@registered.register_fake
def _(logits, bias, top_k, score, groups, kept_groups, renormalize, scale):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    weights = logits.new_empty((rows, top_k), dtype=torch.float32)
    return weights, logits.new_empty((rows, top_k), dtype=torch.int32)


ROUTE = torch.ops.dcompile.route.default
OPERATOR = Operator(ROUTE, route, ("weights", "experts"), formulas.route, body=route)
