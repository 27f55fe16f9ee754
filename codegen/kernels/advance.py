"""The end of a turn of the loop on the device: clocks advance, and whether there is another turn.

What `runtime/turns.py` does between two iterations, so that the same rows run again without the
host: a sequence's clocks go on until its block is done, and the loop ends when a sequence is done,
for then the host has to choose rows anew, after `limit` turns, or when the host says that it is wanted
(somebody waits for a free slot, or was cancelled).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcompile.codegen.triton.assemble import Argument, Shape, assemble, count, operand, power_of_two
from dcompile.codegen.triton.variant import Expression, Lowering


@triton.jit
def advance(
    done,
    iteration,
    tick,
    finished,
    performed,
    turn,
    limit,
    go,
    wanted,
    sequences,
    BLOCK: tl.constexpr,
):
    """done bool, iteration, tick, performed i64, finished i32 [sequences]; the others i32 [1]."""
    b = tl.arange(0, BLOCK)
    inside = b < sequences
    before = tl.load(finished + b, mask=inside, other=1)
    going = (before == 0) & inside
    tl.store(performed + b, tl.load(performed + b, mask=going, other=0) + 1, mask=going)
    now = tl.load(done + b, mask=inside, other=0).to(tl.int32)
    after = tl.maximum(before, tl.where(now != 0, 1, 0))
    tl.store(finished + b, after, mask=inside)
    taken = tl.load(turn) + 1
    tl.store(turn, taken)
    left = taken < tl.load(limit)
    some = tl.max(tl.where(inside, after, 0), 0) != 0
    # In the host's memory, and set while the loop runs: no cache may answer for it.
    asked = tl.load(wanted, volatile=True) != 0
    tl.store(go, (left & (some == 0) & (asked == 0)).to(tl.int32))
    # Whatever was asked: where the loop is a fixed number of turns, they go on.
    on = inside & (after == 0) & left
    tl.store(iteration + b, tl.load(iteration + b, mask=on, other=0) + 1, mask=on)
    tl.store(tick + b, tl.load(tick + b, mask=on, other=0) + 1, mask=on)


def launches(*, sequences: Expression, most: int) -> Lowering:
    """Operands done, iteration, tick, finished, performed, turn, limit, go, wanted.

    At most `most` sequences.
    """
    arguments: list[Argument] = [
        operand("done", "bool"),
        *(operand(name, "i64") for name in ("iteration", "tick")),
        operand("finished", "i32"),
        operand("performed", "i64"),
        *(operand(name, "i32") for name in ("turn", "limit", "go", "wanted")),
        count("sequences", sequences),
    ]
    block = {"BLOCK": power_of_two(most, 32)}
    step = assemble("advance", "advance:advance", arguments, block, Shape((1, 1, 1), 1, 1))
    return Lowering((step,))
