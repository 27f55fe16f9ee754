"""Which experts a row ranks first, and what they weigh: the functions that every router's kernel calls."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores(z, E: tl.constexpr, EP: tl.constexpr, SIGMOID: tl.constexpr):
    """sigmoid or softmax of logits z f32 [BM, EP]; columns from E on are padding."""
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-z))
    else:
        real = (tl.arange(0, EP) < E)[None, :]
        top = tl.max(tl.where(real, z, float("-inf")), 1)
        raised = tl.where(real, tl.exp(z - top[:, None]), 0.0)
        s = raised / tl.sum(raised, 1)[:, None]
    return s


@triton.jit
def ranking(
    z,
    s,
    bias,
    E: tl.constexpr,
    EP: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
):
    """What ranks the experts, f32 [BM, EP]: -inf where one is padding, NaN, or of a group that is left out."""
    e = tl.arange(0, EP)
    by = z if BY_LOGITS else s
    if bias is not None:
        by = by + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    by = tl.where((e < E)[None, :] & (by == by), by, float("-inf"))
    if GROUPS > 1:
        by = tl.where(kept_groups(by, e, E // GROUPS, GROUPS, KEPT, EP, BM), by, float("-inf"))
    return by


@triton.jit
def take(
    by,
    z,
    s,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    BM: tl.constexpr,
):
    """The TOP best (experts i32, their s f32), [BM, TP] each; s is of the chosen's softmax with OF_CHOSEN."""
    e = tl.arange(0, EP)
    left = tl.broadcast_to((e < E)[None, :], [BM, EP])  # what is still to be chosen
    t = tl.arange(0, TP)
    found = tl.zeros([BM, TP], tl.float32)
    index = tl.zeros([BM, TP], tl.int32)
    for rank in tl.static_range(TOP):
        best = tl.max(tl.where(left, by, float("-inf")), 1)
        first = tl.min(tl.where(left & (by == best[:, None]), e[None, :], EP), 1)
        mine = e[None, :] == first[:, None]
        weight = tl.sum(tl.where(mine, z if OF_CHOSEN else s, 0.0), 1)
        found = tl.where(t[None, :] == rank, weight[:, None], found)
        index = tl.where(t[None, :] == rank, first[:, None], index)
        left = left & (e[None, :] != first[:, None])
    if OF_CHOSEN:
        taken = tl.where((t < TOP)[None, :], found, float("-inf"))
        lifted = tl.exp(taken - tl.max(taken, 1)[:, None])
        found = lifted / tl.sum(lifted, 1)[:, None]
    return index, found


@triton.jit
def choose(
    weights,
    experts,
    z,
    bias,
    row,
    live,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
):
    """Route rows with logits z f32 [BM, EP]; columns from E on are padding."""
    s = scores(z, E, EP, SIGMOID)
    by = ranking(z, s, bias, E, EP, BY_LOGITS, GROUPS, KEPT, BM)
    index, found = take(by, z, s, E, EP, TOP, TP, OF_CHOSEN, BM)
    t = tl.arange(0, TP)
    if RENORMALIZE:
        found = found / (tl.sum(found, 1) + 1e-20)[:, None]
    here = live[:, None] & (t < TOP)[None, :]
    place = row[:, None] * TOP + t[None, :]
    tl.store(weights + place, found * SCALE, mask=here)
    tl.store(experts + place, index, mask=here)


@triton.jit
def kept_groups(
    by,
    e,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
):
    """Which experts are of the KEPT best groups, bool [BM, EP]."""
    GP: tl.constexpr = 16 if GROUPS <= 16 else EP
    g = tl.arange(0, GP)
    scores = tl.zeros([BM, GP], tl.float32)
    for group in tl.static_range(GROUPS):
        member = tl.where((e // SIZE == group)[None, :], by, float("-inf"))
        best = tl.max(member, 1)
        score = best
        if SIZE > 1:
            first = tl.min(tl.where(member == best[:, None], e[None, :], EP), 1)
            second = tl.where(e[None, :] == first[:, None], float("-inf"), member)
            score = best + tl.max(second, 1)
        scores = tl.where(g[None, :] == group, score[:, None], scores)
    left = tl.broadcast_to((g < GROUPS)[None, :], [BM, GP])
    kept = tl.broadcast_to((e < 0)[None, :], [BM, EP])
    for _ in tl.static_range(KEPT):
        best_group = tl.max(tl.where(left, scores, float("-inf")), 1)
        chosen = tl.min(tl.where(left & (scores == best_group[:, None]), g[None, :], GP), 1)
        kept = kept | (e[None, :] // SIZE == chosen[:, None])
        left = left & (g[None, :] != chosen[:, None])
    return kept
