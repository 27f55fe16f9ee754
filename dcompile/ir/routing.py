"""Which experts a row takes, and the limits: experts that a block reads, tokens that an expert gets."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

NEG_INF = float("-inf")


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
    """As `ops.route`."""
    s, keys = scores(logits, bias, score, groups, kept_groups)
    chosen = best(keys, top_k)
    share = shares(logits, s, chosen, score, renormalize, scale)
    return share.gather(-1, chosen), chosen.to(torch.int32)


@custom_op("dcompile::route_limited", mutates_args=())
def route_limited(
    logits: Tensor,
    bias: Tensor | None,
    row_seq: Tensor,
    row_pos: Tensor,
    block_seq: Tensor,
    block_pos: Tensor,
    top_k: int,
    score: str,
    groups: int,
    kept_groups: int,
    renormalize: bool,
    scale: float,
    capacity: float,
    reroute: bool,
    pool: int,
) -> tuple[Tensor, Tensor]:
    """`route` with limits; an expert that a row lost is -1, with weight 0.

    pool > 0 (LLaDA2.2): the rows of one block of a sequence, counted from the block that it decides
    now, choose among the `pool` experts with the greatest keys in those rows.  capacity > 0
    (Capacity-Aware Inference, arXiv 2503.05066): of a sequence's T rows an expert takes at most
    ceil(capacity T k / E), by its score, ties to the lower row; a row that lost one gets, with
    `reroute` and in the order of rows, its best expert that has room.  Weights keep the divisor of the
    first choice.  No row depends on another sequence's.
    """
    s, keys = scores(logits, bias, score, groups, kept_groups)
    experts = keys.shape[1]
    if 0 < pool < experts:
        begin = torch.zeros_like(row_pos)
        for seq, pos in zip(block_seq.tolist(), block_pos[:, 0].tolist(), strict=True):
            begin = torch.where(row_seq == seq, pos, begin)
        block = (row_pos - begin).div(block_pos.shape[1], rounding_mode="floor")
        for pair in torch.stack((row_seq, block), 1).unique(dim=0).tolist():
            rows = ((row_seq == pair[0]) & (block == pair[1])).nonzero()[:, 0]
            keep = torch.zeros(experts, dtype=torch.bool)
            keep[best(keys[rows].amax(0), pool)] = True
            keys[rows] = keys[rows].masked_fill(~keep, NEG_INF)
    chosen = best(keys, top_k)
    share = shares(logits, s, chosen, score, renormalize, scale)
    if capacity > 0:
        for seq in row_seq.unique().tolist():
            rows = (row_seq == seq).nonzero()[:, 0]
            room = max(1, math.ceil(capacity * len(rows) * top_k / experts - 1e-9))
            chosen[rows] = _limit(chosen[rows], s[rows] if score != "softmax_chosen" else share[rows],
                                  keys[rows], room, reroute)  # fmt: skip
    weights = torch.where(chosen >= 0, share.gather(-1, chosen.clamp_min(0)), 0.0)
    return weights, chosen.to(torch.int32)


def _limit(chosen: Tensor, score: Tensor, keys: Tensor, room: int, reroute: bool) -> Tensor:
    """The rows of one sequence: each expert keeps `room` of them."""
    out = chosen.clone()
    load = [0] * keys.shape[1]
    for e in range(len(load)):
        row, slot = (chosen == e).nonzero(as_tuple=True)
        by = torch.where(score[row, e].isnan(), NEG_INF, score[row, e])
        lost = best(by, len(by))[room:]
        out[row[lost], slot[lost]] = -1
        load[e] = min(len(row), room)
    if not reroute:
        return out
    for r, j in (out < 0).nonzero().tolist():
        free = [e for e, n in enumerate(load) if n < room and keys[r, e] > NEG_INF]
        free = [e for e in free if e not in out[r].tolist()]
        if free:
            e = max(free, key=lambda e: (float(keys[r, e]), -e))
            out[r, j] = e
            load[e] += 1
    return out


@route_limited.register_fake
def _(logits, bias, row_seq, row_pos, block_seq, block_pos, top_k, *how):  # type: ignore[no-untyped-def]
    weights = logits.new_empty((logits.shape[0], top_k), dtype=torch.float32)
    return weights, logits.new_empty((logits.shape[0], top_k), dtype=torch.int32)


ROUTE_LIMITED = torch.ops.dcompile.route_limited.default
