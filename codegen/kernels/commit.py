"""The end of an iteration: which tokens stay, written to the canvas, and whether the loop goes on.

A position is a candidate while the canvas holds the mask there.  The policy says which candidates
commit; where it names none, the most confident one does (the first of equals).  Counters advance
here, on the device, so that the whole loop of a block can be one launch: `go` is 1 while a sequence
has masks left and fewer than `cap` turns were taken.

Policies are device functions `f(confidence, position, iteration, entered, knob) -> bool [block]`:
* threshold (Fast-dLLM, arXiv 2505.22618): confidence >= min(threshold, best - 1e-5);
* steps (LLaDA, arXiv 2502.09992): the share of an even schedule over `steps` iterations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.kernels.assemble import (
    PACKAGE,
    Shape,
    assemble,
    operand,
    power_of_two,
    temporary,
)
from dcompile.codegen.kernels.dot import arrives_last
from dcompile.codegen.kernels.variant import Expression, Lowering, Scratch

POLICIES = {"threshold": "threshold", "steps": "steps"}  # policy -> its one run-time parameter


@triton.jit
def threshold(confidence, position, iteration, entered, knob):
    return confidence >= tl.minimum(knob, tl.max(confidence, 0) - 1e-5)


@triton.jit
def steps(confidence, position, iteration, entered, knob):
    """The best of the rest first; of equals, the first position."""
    total = tl.maximum(knob.to(tl.int64), 1)
    base = entered // total
    quota = tl.maximum(base + (iteration < entered - base * total).to(tl.int64), 1)
    before = position[None, :] < position[:, None]
    other, mine = confidence[None, :], confidence[:, None]
    ahead = (other > mine) | ((other == mine) & before)
    return tl.sum(ahead.to(tl.int32), 1) < quota


@triton.jit
def commit(
    canvas,
    done,
    committed,
    block_seq,
    block_pos,
    token,
    confidence,
    iteration,
    entered,
    knob,
    tick,
    turn,
    cap,
    go,
    ticket,
    POLICY: tl.constexpr,
    MASK: tl.constexpr,
    L: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """canvas i64 [N, L], done bool [B], committed bool [B, LENGTH], the inputs of docs/design.md.

    turn, cap, go i32 [1], of the loop on the device; absent with tick where the host loops.
    """
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < LENGTH
    at = b * LENGTH + i
    pos = tl.load(block_pos + at, mask=inside, other=0)
    place = canvas + tl.load(block_seq + b) * L + pos
    current = tl.load(place, mask=inside, other=MASK + 1)
    candidate = inside & (current == MASK)
    sure = tl.load(confidence + at, mask=candidate, other=float("-inf"))
    turns = tl.load(iteration + b)
    wanted = candidate & POLICY(sure, pos, turns, tl.load(entered + b), tl.load(knob + b))
    tied = candidate & (sure >= tl.max(sure, 0))
    first = tied & (pos == tl.min(tl.where(tied, pos, 4611686018427387904), 0))
    some = tl.max(wanted.to(tl.int32), 0)
    commits = tl.where(some > 0, wanted, first)
    updated = tl.where(commits, tl.load(token + at, mask=inside, other=0), current)
    tl.store(place, updated, mask=commits)
    tl.store(committed + at, commits, mask=inside)
    masks = tl.sum((inside & (updated == MASK)).to(tl.int32), 0)
    tl.store(done + b, masks == 0)
    if go is not None:
        # A sequence that was done before this turn has taken no part in it.
        active = tl.max(candidate.to(tl.int64), 0)
        tl.store(iteration + b, turns + active)
        tl.store(tick + b, tl.load(tick + b) + active)
        if arrives_last(ticket, tl.num_programs(0)):
            left = 0
            for other in range(tl.num_programs(0)):
                finished = tl.load(done + other, cache_modifier=".cg").to(tl.int32)
                left += 1 - finished
            taken = tl.load(turn) + 1
            tl.store(turn, taken)
            tl.store(go, ((left > 0) & (taken < tl.load(cap))).to(tl.int32))


def launches(
    *,
    sequences: Expression,
    length: int,
    positions: int,
    mask_id: int,
    policy: str,
    loop: bool = False,
) -> Lowering:
    """Operands canvas, done, committed, block_seq, block_pos, token, confidence, iteration, entered, and the
    policy's parameter by its name (`POLICIES`).  With `loop` also tick, turn, cap, go, and counters advance.
    """
    step = assemble(
        f"commit_{policy}{'_loop' if loop else ''}_n{length}",
        "commit:commit",
        [
            operand("canvas", "i64"),
            *(operand(name, "bool") for name in ("done", "committed")),
            *(operand(name, "i64") for name in ("block_seq", "block_pos", "token")),
            operand("confidence", "f32"),
            *(operand(name, "i64") for name in ("iteration", "entered")),
            operand("knob", "f32", called=POLICIES[policy]),
            operand("tick", "i64", loop),
            *(operand(name, "i32", loop) for name in ("turn", "cap", "go")),
            temporary("ticket", "i32", loop),
        ],
        {
            "POLICY": f"{PACKAGE}.commit:{policy}",
            **{"MASK": mask_id, "L": positions, "LENGTH": length, "BLOCK": power_of_two(length)},
        },
        Shape((sequences, 1, 1), warps=1, stages=1),
    )
    return Lowering((step,), (Scratch("ticket", "i32", 1, zeroed=True),) if loop else ())
