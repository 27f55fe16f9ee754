"""Every iteration manager a second time, from the specification alone: one row, no cache, plain Python.

A model is a function from token ids to logits [T, V]. Every forward computes the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from reference_policies import Knobs, Memory, Seen, choose, iterate

Logits = npt.NDArray[np.float32]
Model = Callable[[list[int]], Logits]
Held = dict[int, npt.NDArray[np.float32]]
SoftModel = Callable[[list[int], Held], Logits]
"""The same with something added to the embeddings of some positions."""


@dataclass(frozen=True)
class Facts:
    """What the model and the request fix."""

    mask_id: int
    stop_ids: frozenset[int]
    block: int
    aligned: bool = False
    shift: bool = False
    early_stop: bool = True


@dataclass
class Made:
    tokens: list[int]
    forwards: int
    x: list[int] = field(default_factory=list)


def begin(prompt: Sequence[int], gen_length: int, facts: Facts) -> tuple[list[int], int]:
    """The canvas, and where the first block starts."""
    n, P = facts.block, len(prompt)
    total = P + gen_length
    if facts.aligned:
        total = -(-total // n) * n
    x = [*prompt, *[facts.mask_id] * (total - P)]
    return x, P // n * n if facts.aligned else P


def see(
    logits: Logits, x: list[int], b: int, e: int, P: int, facts: Facts, iteration: int, entered: int
) -> Seen:
    rows = [max(i - 1, 0) if facts.shift else i for i in range(b, e)]
    z = logits[rows]
    token, confidence, margin, entropy = choose(z, facts.mask_id)
    return Seen(
        logits=np.asarray(z, np.float64),
        token=token,
        confidence=confidence,
        margin=margin,
        entropy=entropy,
        chance=[],
        current=x[b:e],
        mask_id=facts.mask_id,
        generated=[i >= P for i in range(b, e)],
        iteration=iteration,
        entered=entered,
    )


def stopped(x: list[int], P: int, end: int, facts: Facts) -> int | None:
    """Where the first end of sequence is among the generated tokens before `end`."""
    return next((i for i in range(P, end) if x[i] in facts.stop_ids), None)


def blockwise(
    model: Model, prompt: Sequence[int], gen_length: int, facts: Facts, policy: str, knobs: Knobs
) -> Made:
    """Blocks left to right; a block's iterations repeat until it holds no mask."""
    x, b = begin(prompt, gen_length, facts)
    P, n, forwards = len(prompt), facts.block, 0
    while b < P + gen_length:
        e, iteration, memory = b + n, 0, Memory()
        entered, done = x[b:e].count(facts.mask_id), False
        while not done:
            seen = see(model(x), x, b, e, P, facts, iteration, entered)
            x[b:e], done = iterate(policy, seen, knobs, memory)
            iteration, forwards = iteration + 1, forwards + 1
        at = stopped(x, P, min(e, P + gen_length), facts)
        if facts.early_stop and at is not None:
            x[at:] = [x[at]] * (len(x) - at)
            break
        b = e
    return Made(x[P : P + gen_length], forwards, x)


def canvas(
    model: Model, prompt: Sequence[int], gen_length: int, facts: Facts, policy: str, knobs: Knobs
) -> Made:
    """All generated positions are one block."""
    whole = Facts(**{**vars(facts), "block": gen_length, "aligned": False})
    return blockwise(model, prompt, gen_length, whole, policy, knobs)


def pipelined(
    model: Model,
    prompt: Sequence[int],
    gen_length: int,
    facts: Facts,
    policy: str,
    knobs: Knobs,
    max_blocks: int,
) -> Made:
    """D2F's rules, on the whole sequence so far under the model's block-causal mask."""
    x, first = begin(prompt, gen_length, facts)
    P, n, forwards = len(prompt), facts.block, 0
    blocks: list[dict[str, int]] = []  # begin, masks when added, forwards since, full

    def masks(block: Mapping[str, int]) -> int:
        return x[block["begin"] : block["begin"] + n].count(facts.mask_id)

    def fraction(block: Mapping[str, int]) -> float:
        return 1 - masks(block) / block["masks"]

    while True:
        at = first + n * len(blocks)
        ended = facts.early_stop and stopped(x, P, at, facts) is not None
        few = sum(masks(block) > 0 for block in blocks) < max_blocks
        ready = not blocks or fraction(blocks[-1]) >= knobs["tau_add"]
        if at < len(x) and few and not ended and ready:
            entered = x[at : at + n].count(facts.mask_id)
            blocks.append({"begin": at, "masks": entered, "forwards": 0, "full": not blocks})
        for before, block in pairwise(blocks):
            block["full"] |= fraction(before) >= knobs["tau_activate"]
        logits = model(x[: first + n * len(blocks)])
        forwards += 1
        for block in [block for block in blocks if masks(block)]:
            b, e = block["begin"], block["begin"] + n
            seen = see(logits, x, b, e, P, facts, block["forwards"], block["masks"])
            x[b:e], _ = iterate(policy, seen, knobs, Memory(), bool(block["full"]))
            block["forwards"] += 1
        complete = first
        for block in blocks:
            if masks(block):
                break
            complete = block["begin"] + n
        at = stopped(x, P, min(complete, P + gen_length), facts)
        if facts.early_stop and at is not None:
            x[at:] = [x[at]] * (len(x) - at)
            break
        if complete >= P + gen_length:
            break
    return Made(x[P : P + gen_length], forwards, x)


def smoothed(
    model: SoftModel,
    table: npt.NDArray[np.float32],
    prompt: Sequence[int],
    gen_length: int,
    facts: Facts,
    policy: str,
    knobs: Knobs,
) -> Made:
    """Blockwise, with each mask's embedding moved towards what was predicted there.

    A block-causal model computes no position after the block.
    """
    x, b = begin(prompt, gen_length, facts)
    P, n, t, held = len(prompt), facts.block, 0, Held()
    while b < P + gen_length:
        e, iteration, memory = b + n, 0, Memory()
        entered, done = x[b:e].count(facts.mask_id), False
        while not done:
            logits = model(x[:e] if facts.aligned else x, held)
            tau = dict(knobs)
            if "threshold" in tau:
                tau["threshold"] = max(1 - 0.02 * t, knobs["threshold"])
            seen = see(logits, x, b, e, P, facts, iteration, entered)
            x[b:e], done = iterate(policy, seen, tau, memory)
            weight = min(0.15 + 0.02 * t, knobs["smoothing"])
            z = np.asarray(logits, np.float64)
            p = np.exp(z - z.max(-1, keepdims=True))
            mixed = weight * (p / p.sum(-1, keepdims=True)) @ table[: z.shape[1]].astype(np.float64)
            held = {i: v.astype(np.float32) for i, v in enumerate(mixed) if x[i] == facts.mask_id}
            iteration, t = iteration + 1, t + 1
        at = stopped(x, P, min(e, P + gen_length), facts)
        if facts.early_stop and at is not None:
            x[at:] = [x[at]] * (len(x) - at)
            break
        b = e
    return Made(x[P : P + gen_length], t, x)
