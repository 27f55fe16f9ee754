"""`route` with limits, as ir/operators/ has it: an expert takes so many rows, a block reads so many experts.

* `rank` (with a pool): every row's keys, by which it ranks the experts.
* `choose_within`: with a pool (LLaDA2.2) the rows of one block of a sequence, counted from the block that it
  decides now, choose among the POOL experts whose best key in those rows is greatest.  A program is a
  row and reads the keys of its block's rows.
* `drop` (with a capacity; Capacity-Aware Inference, arXiv 2503.05066): of a sequence's T rows an expert takes
  ceil(capacity T k / E), by score, the lower row first of equals; a slot that loses is expert -1, weight 0.
* `reroute`: row by row, a lost slot gets the row's best expert with room; a program is a sequence, because
  what has room depends on the rows before.

A sequence's rows may lie anywhere among the rows.  Weights keep the divisor of the first choice.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from dcompile.codegen.kernels.choice import ranking, scores, take
from dcompile.codegen.kernels.route import constants_of, name_of
from dcompile.codegen.triton.assemble import (
    Argument,
    Shape,
    assemble,
    count,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.triton.variant import Expression, Lowering, Scratch, Step

RESULTS = ("weights", "experts")


@triton.jit
def logits_of(logits, row, E: tl.constexpr, EP: tl.constexpr):
    """One row's logits, f32 [1, EP]."""
    e = tl.arange(0, EP)
    return tl.load(logits + row * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rank(
    keys,
    logits,
    bias,
    E: tl.constexpr,
    EP: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """keys f32 [rows, E], logits [rows, E], bias [E]."""
    row = tl.program_id(0)
    e = tl.arange(0, EP)
    z = logits_of(logits, row, E, EP)
    s = scores(z, E, EP, SIGMOID)
    by = ranking(z, s, bias, E, EP, BY_LOGITS, GROUPS, KEPT, 1)
    tl.store(keys + row * E + e[None, :], by, mask=(e < E)[None, :])


@triton.jit
def block_of(past, BLOCK: tl.constexpr):
    """The number of the block that a position is in, `past` positions from where block 0 begins."""
    return tl.where(past >= 0, past // BLOCK, -((BLOCK - 1 - past) // BLOCK))


@triton.jit
def pooled(
    keys,
    row,
    row_seq,
    row_pos,
    block_seq,
    block_pos,
    rows,
    blocks,
    E: tl.constexpr,
    EP: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
):
    """Which experts are in the pool of a row's block, bool [1, EP]."""
    sequence = tl.load(row_seq + row)
    begin = tl.full([], 0, tl.int64)
    for b in range(blocks):
        first = tl.load(block_pos + b * BLOCK)
        begin = tl.where(tl.load(block_seq + b) == sequence, first, begin)
    own = block_of(tl.load(row_pos + row) - begin, BLOCK)
    e = tl.arange(0, EP)
    best = tl.full([EP], float("-inf"), tl.float32)
    for base in range(0, rows, BR):
        r = base + tl.arange(0, BR)
        inside = r < rows
        same = inside & (tl.load(row_seq + r, mask=inside, other=-1) == sequence)
        at = block_of(tl.load(row_pos + r, mask=inside, other=0) - begin, BLOCK)
        here = (same & (at == own))[:, None] & (e < E)[None, :]
        found = tl.load(keys + r[:, None] * E + e[None, :], mask=here, other=float("-inf"))
        best = tl.maximum(best, tl.max(found, 0))
    left = e < E
    held = e < 0
    for _ in range(POOL):
        highest = tl.max(tl.where(left, best, float("-inf")), 0)
        taken = tl.min(tl.where(left & (best == highest), e, EP), 0)
        left = left & (e != taken)
        held = held | (e == taken)
    return held[None, :]


@triton.jit
def choose_within(
    weights,
    experts,
    logits,
    bias,
    keys,
    open_keys,
    score,
    factor,
    row_seq,
    row_pos,
    block_seq,
    block_pos,
    rows,
    blocks,
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
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
):
    """weights f32, experts i32 [rows, TOP]; for what follows open_keys, score f32 [rows, E], factor f32 [rows].

    score is what an expert ranks its rows by, and times factor a row's weight; open_keys are -inf outside
    the pool.  row_seq, row_pos i64 [rows], block_seq i64 [blocks], block_pos i64 [blocks, BLOCK].
    """
    row = tl.program_id(0)
    e = tl.arange(0, EP)
    real = (e < E)[None, :]
    z = logits_of(logits, row, E, EP)
    s = scores(z, E, EP, SIGMOID)
    by = ranking(z, s, bias, E, EP, BY_LOGITS, GROUPS, KEPT, 1)
    if POOL > 0:
        held = pooled(
            keys, row, row_seq, row_pos, block_seq, block_pos, rows, blocks, E, EP, POOL, BLOCK, BR
        )
        by = tl.where(held, by, float("-inf"))
    index, found = take(by, z, s, E, EP, TOP, TP, OF_CHOSEN, 1)
    by_factor = tl.full([1], SCALE, tl.float32)
    if RENORMALIZE:
        by_factor = by_factor / (tl.sum(found, 1) + 1e-20)
    t = tl.arange(0, TP)
    place = row * TOP + t[None, :]
    tl.store(weights + place, found * by_factor[:, None], mask=(t < TOP)[None, :])
    tl.store(experts + place, index, mask=(t < TOP)[None, :])
    if score is not None:
        if OF_CHOSEN:
            chosen = e[None, :, None] == tl.where(t < TOP, index, EP)[:, None, :]
            taken = tl.max(chosen.to(tl.int32), 2) != 0
            raised = tl.exp(z - tl.max(tl.where(taken, z, float("-inf")), 1)[:, None])
            s = raised / tl.sum(tl.where(taken, raised, 0.0), 1)[:, None]
        tl.store(score + row * E + e[None, :], s, mask=real)
        tl.store(factor + row + tl.arange(0, 1), by_factor)
    if open_keys is not None:
        tl.store(open_keys + row * E + e[None, :], by, mask=real)


@triton.jit
def room_for(members, CAPACITY: tl.constexpr, TOP: tl.constexpr, E: tl.constexpr):
    """How many rows of a sequence of `members` rows an expert takes; in float64, as on the CPU."""
    share = tl.full([1], CAPACITY, tl.float64) * members.to(tl.float64) * TOP / E
    return tl.maximum(tl.ceil(share - 1e-9).to(tl.int32), 1)


@triton.jit
def drop(
    weights,
    experts,
    first_weights,
    first_experts,
    score,
    row_seq,
    rows,
    E: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    CAPACITY: tl.constexpr,
    BR: tl.constexpr,
):
    """weights, experts [rows, TOP] from the first choice: -1 and 0 where the expert has no room for the row."""
    row = tl.program_id(0)
    sequence = tl.load(row_seq + row)
    t = tl.arange(0, TP)
    mine = tl.load(first_experts + row * TOP + t, mask=t < TOP, other=0)
    own = tl.load(score + row * E + mine, mask=t < TOP, other=0.0)
    own = tl.where(own == own, own, float("-inf"))
    ahead = tl.zeros([TP], tl.int32)
    members = tl.zeros([1], tl.int32)
    for base in range(0, rows, BR):
        r = base + tl.arange(0, BR)
        inside = r < rows
        same = inside & (tl.load(row_seq + r, mask=inside, other=-1) == sequence)
        members += tl.sum(same.to(tl.int32), 0)
        wants = tl.zeros([BR, TP], tl.int32)
        for j in range(TOP):
            theirs = tl.load(first_experts + r * TOP + j, mask=same, other=-1)
            wants = wants | (theirs[:, None] == mine[None, :]).to(tl.int32)
        here = same[:, None] & (wants != 0)
        theirs_score = tl.load(
            score + r[:, None] * E + mine[None, :], mask=here, other=float("-inf")
        )
        by = tl.where(theirs_score == theirs_score, theirs_score, float("-inf"))
        tied = (by == own[None, :]) & (r < row)[:, None]
        ahead += tl.sum((here & ((by > own[None, :]) | tied)).to(tl.int32), 0)
    kept = ahead < room_for(members, CAPACITY, TOP, E)
    place = row * TOP + t
    weight = tl.load(first_weights + place, mask=t < TOP, other=0.0)
    tl.store(weights + place, tl.where(kept, weight, 0.0), mask=t < TOP)
    tl.store(experts + place, tl.where(kept, mine, -1), mask=t < TOP)


@triton.jit
def reroute(
    weights,
    experts,
    kept_weights,
    kept_experts,
    open_keys,
    score,
    factor,
    row_seq,
    rows,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    TP: tl.constexpr,
    CAPACITY: tl.constexpr,
    BR: tl.constexpr,
):
    """weights, experts [rows, TOP] from what `drop` kept; a program is the sequence of that number."""
    sequence = tl.program_id(0)
    e = tl.arange(0, EP)
    t = tl.arange(0, TP)
    load = tl.zeros([EP], tl.int32)
    members = tl.zeros([1], tl.int32)
    for base in range(0, rows, BR):
        r = base + tl.arange(0, BR)
        inside = r < rows
        same = inside & (tl.load(row_seq + r, mask=inside, other=-1) == sequence)
        members += tl.sum(same.to(tl.int32), 0)
        for j in range(TOP):
            theirs = tl.load(kept_experts + r * TOP + j, mask=same, other=-1)
            load += tl.sum((theirs[:, None] == e[None, :]).to(tl.int32), 0)
    room = room_for(members, CAPACITY, TOP, E)
    for row in range(rows):
        if tl.load(row_seq + row) == sequence:
            place = row * TOP + t
            mine = tl.load(kept_experts + place, mask=t < TOP, other=0)
            weight = tl.load(kept_weights + place, mask=t < TOP, other=0.0)
            if tl.min(mine, 0) < 0:
                keys = tl.load(open_keys + row * E + e, mask=e < E, other=float("-inf"))
                own = tl.load(score + row * E + e, mask=e < E, other=0.0) * tl.load(factor + row)
                for j in range(TOP):
                    lost = tl.sum(tl.where(t == j, mine, 0), 0) < 0
                    held = (mine[:, None] == e[None, :]) & (t < TOP)[:, None]
                    free = (load < room) & (tl.max(held.to(tl.int32), 0) == 0)
                    free = free & (keys > float("-inf")) & lost
                    if tl.max(free.to(tl.int32), 0) > 0:
                        best = tl.max(tl.where(free, keys, float("-inf")), 0)
                        taken = tl.min(tl.where(free & (keys == best), e, EP), 0)
                        load += (e == taken).to(tl.int32)
                        mine = tl.where(t == j, taken, mine)
                        gained = tl.sum(tl.where(e == taken, own, 0.0), 0)
                        weight = tl.where(t == j, gained, weight)
            tl.store(weights + place, weight, mask=t < TOP)
            tl.store(experts + place, mine, mask=t < TOP)


def launches(
    *,
    rows: Expression,
    blocks: Expression,
    slots: int,
    block_length: int,
    num_experts: int,
    top_k: int,
    score: str = "softmax",
    groups: int = 1,
    kept_groups: int = 1,
    renormalize: bool = False,
    scale: float = 1.0,
    capacity: float = 0.0,
    overflow_reroutes: bool = False,
    pool: int = 0,
    dtype: str = "f32",
    bias: str | None = None,
) -> Lowering:
    """Operands weights, experts [rows, top_k], logits [rows, num_experts] of `dtype`, bias of dtype `bias`,
    row_seq, row_pos i64 [rows], block_seq i64 [blocks], block_pos i64 [blocks, block_length].

    Without limits it is `route`.  Sequences are numbered below `slots`.
    """
    routing = constants_of(num_experts, top_k, score, groups, kept_groups, renormalize, scale)
    name = f"{name_of(routing, bias is not None)}_{dtype}"
    slots_of = {key: routing[key] for key in ("E", "TOP", "TP")}
    ranks = {key: routing[key] for key in ("E", "EP", "SIGMOID", "BY_LOGITS", "GROUPS", "KEPT")}
    wide = power_of_two(num_experts, 16)
    capped, moves = capacity > 0, capacity > 0 and overflow_reroutes
    pool = pool if pool < num_experts else 0
    one_a_row = Shape((rows, 1, 1), warps=4, stages=1)
    bound = {"CAPACITY": float(capacity), "BR": 64}
    read = [operand("logits", dtype), operand("bias", bias or "f32", bias is not None)]
    first = _passed("first", capped)
    steps: list[Step] = []
    if pool:
        arguments = [temporary("keys", "f32"), *read]
        steps.append(assemble(f"rank_{name}", "route_limited:rank", arguments, ranks, one_a_row))
    steps.append(
        assemble(
            f"route_within{f'_p{pool}' if pool else ''}{'_capped' if capped else ''}_{name}",
            "route_limited:choose_within",
            [
                *(_as(n, a) for n, a in zip(RESULTS, first, strict=True)),
                *read,
                temporary("keys", "f32", pool > 0),
                temporary("open_keys", "f32", moves),
                temporary("score", "f32", capped),
                temporary("factor", "f32", capped),
                *(operand(n, "i64") for n in ("row_seq", "row_pos", "block_seq", "block_pos")),
                count("rows", rows),
                count("blocks", blocks),
            ],
            {**routing, "POOL": pool, "BLOCK": block_length, "BR": max(1, 4096 // wide)},
            one_a_row,
        )
    )
    if capped:
        kept = _passed("kept", moves)
        steps.append(
            assemble(
                f"drop_e{num_experts}k{top_k}c{capacity:g}",
                "route_limited:drop",
                [
                    *(_as(n, a) for n, a in zip(RESULTS, kept, strict=True)),
                    *first,
                    temporary("score", "f32"),
                    operand("row_seq", "i64"),
                    count("rows", rows),
                ],
                {**slots_of, **bound},
                one_a_row,
            )
        )
    if moves:
        steps.append(
            assemble(
                f"reroute_e{num_experts}k{top_k}c{capacity:g}",
                "route_limited:reroute",
                [
                    *_passed("", False),
                    *kept,
                    *(temporary(n, "f32") for n in ("open_keys", "score", "factor")),
                    operand("row_seq", "i64"),
                    count("rows", rows),
                ],
                {**slots_of, "EP": routing["EP"], **bound, "BR": max(1, 4096 // wide)},
                Shape((slots, 1, 1), warps=4, stages=1),
            )
        )
    return Lowering(tuple(steps), _scratch(rows, num_experts, top_k, pool > 0, capped, moves))


def _passed(stage: str, handed_on: bool) -> list[Argument]:
    """Weights and experts as one launch hands them to the next, or as the results of the operator."""
    types = zip(RESULTS, ("f32", "i32"), strict=True)
    return [temporary(f"{stage}_{n}", t) if handed_on else operand(n, t) for n, t in types]


def _as(name: str, argument: Argument) -> Argument:
    """An argument under the name that a kernel has for it."""
    return replace(argument, parameter=replace(argument.parameter, name=name))


def _scratch(
    rows: Expression, experts: int, top_k: int, pool: bool, capped: bool, moves: bool
) -> tuple[Scratch, ...]:
    by_expert: Expression = {"mul": [rows, experts]}
    slots: Expression = {"mul": [rows, top_k]}
    found = [
        (pool, Scratch("keys", "f32", by_expert)),
        (moves, Scratch("open_keys", "f32", by_expert)),
        (capped, Scratch("score", "f32", by_expert)),
        (capped, Scratch("factor", "f32", rows)),
        (capped, Scratch("first_weights", "f32", slots)),
        (capped, Scratch("first_experts", "i32", slots)),
        (moves, Scratch("kept_weights", "f32", slots)),
        (moves, Scratch("kept_experts", "i32", slots)),
    ]
    return tuple(scratch for wanted, scratch in found if wanted)
