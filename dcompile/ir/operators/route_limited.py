"""Routing with limits: experts that a block reads, tokens that an expert gets."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

from dcompile.ir.operators.base import NEG_INF, Operator
from dcompile.ir.operators.route import best, scores, shares
from dcompile.ir.work import formulas


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


registered = custom_op("dcompile::route_limited", route_limited, mutates_args=())


@registered.register_fake
def _(logits, bias, row_seq, row_pos, block_seq, block_pos, top_k, *how):  # type: ignore[no-untyped-def]
    weights = logits.new_empty((logits.shape[0], top_k), dtype=torch.float32)
    return weights, logits.new_empty((logits.shape[0], top_k), dtype=torch.int32)


ROUTE_LIMITED = torch.ops.dcompile.route_limited.default
OPERATOR = Operator(ROUTE_LIMITED, route_limited, ("weights", "experts"), formulas.route)
