"""Every decoding policy a second time, from the specification alone: one row, plain Python and numpy.

A policy is a function `(seen, knobs, memory) -> Decided`. Positions are numbered within the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

F = np.float32
Floats = npt.NDArray[np.float32]
Memory = dict[str, Any]
Knobs = Mapping[str, float]


@dataclass
class Seen:
    """What the model says of the block, and how far decoding is."""

    logits: npt.NDArray[np.float64]  # [n, V]
    token: list[int]  # the model's choice, never the mask
    confidence: list[np.float32]
    margin: list[np.float32]
    entropy: list[np.float32]
    chance: list[np.float32]
    current: list[int]
    mask_id: int
    generated: list[bool]  # no part of the prompt
    iteration: int
    entered: int

    @property
    def candidates(self) -> list[int]:
        return [i for i, token in enumerate(self.current) if token == self.mask_id]

    @property
    def filled(self) -> list[int]:
        n = range(len(self.current))
        return [i for i in n if self.current[i] != self.mask_id and self.generated[i]]


@dataclass
class Decided:
    """Tokens to write, positions to mask again, and whether to go on without masks."""

    write: dict[int, int]
    reopen: set[int] = field(default_factory=set)
    more: bool = False


Reference = Callable[[Seen, Knobs, Memory], Decided]


def take(seen: Seen, places: set[int] | list[int]) -> Decided:
    return Decided({i: seen.token[i] for i in places})


def best_first(score: Mapping[int, Any]) -> list[int]:
    """Positions by falling score; the first of equals comes first."""
    return sorted(score, key=lambda i: (-score[i], i))


def above(confidence: Mapping[int, np.float32], tau: float) -> set[int]:
    """c >= tau; where there is none, the single best."""
    passed = {i for i, c in confidence.items() if c >= F(tau)}
    return passed or set(best_first(confidence)[:1])


def of_candidates(seen: Seen, values: list[Any]) -> dict[int, Any]:
    return {i: values[i] for i in seen.candidates}


def threshold(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    return take(seen, above(of_candidates(seen, seen.confidence), knobs["threshold"]))


def even_share(many: int, seen: Seen, steps: float) -> int:
    share, rest = divmod(many, int(steps))
    return max(share + (seen.iteration < rest), 1)


def steps(score: str) -> Reference:
    def decide(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
        values = {
            "low_confidence": seen.confidence,
            "random": seen.chance,
            "margin": seen.margin,
            "entropy": [-h for h in seen.entropy],
        }[score]
        order = best_first(of_candidates(seen, values))
        return take(seen, order[: even_share(seen.entered, seen, knobs["steps"])])

    return decide


def factor(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    order = best_first(of_candidates(seen, seen.confidence))
    count = 1
    for rank in range(2, len(order) + 1):
        if seen.confidence[order[rank - 1]] < F(1) - F(knobs["factor"]) / F(rank + 1):
            break
        count = rank
    return take(seen, order[:count])


def hierarchical(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    c = of_candidates(seen, seen.confidence)
    runs: list[list[int]] = []
    for i in seen.candidates:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    chosen = {i for i in c if c[i] > F(knobs["threshold"])}
    for run in runs:
        top = max(c[i] for i in run)
        chosen |= {i for i in run if c[i] == top and c[i] > F(knobs["threshold_low"])}
    return take(seen, chosen | set(best_first(c)[:1]))


def credit(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    """With the whole matrix K [n, V] of the formula, in float64."""
    z = seen.logits
    K = memory.get("K")
    K = np.zeros_like(z) if K is None else knobs["beta"] * K
    for i in seen.candidates:
        K[i, seen.token[i]] += max(float(seen.confidence[i]), 0.0) ** knobs["gamma"]
    memory["K"] = K
    fused = z + knobs["alpha"] * np.log1p(K)
    token, confidence = {}, {}
    for i in seen.candidates:
        e = np.exp(fused[i] - fused[i].max())
        e /= e.sum()
        open_ = [v for v in range(z.shape[1]) if v != seen.mask_id]
        token[i] = max(open_, key=lambda v: (e[v], -v))
        confidence[i] = F(e[token[i]])
    memory["confidence"] = confidence
    chosen = above(confidence, knobs["threshold"])
    return Decided({i: token[i] for i in chosen})


def dynamic(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    c = of_candidates(seen, seen.confidence)
    sure = {i for i in c if c[i] > F(knobs["threshold"])}
    share = min(even_share(len(seen.current), seen, knobs["steps"]), len(c))
    return take(seen, sure if len(sure) >= share else best_first(c)[:share])


def edit(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    chosen = above(of_candidates(seen, seen.confidence), knobs["threshold"])
    changes = {
        i
        for i in seen.filled
        if seen.token[i] != seen.current[i] and seen.confidence[i] > F(knobs["threshold_edit"])
    }
    full = not seen.candidates
    memory["post"] = memory.get("post", 0) + full
    more = memory["post"] < knobs["post_steps"] and (bool(changes) or not full)
    return Decided(take(seen, chosen | changes).write, more=more)


def remask(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    if not seen.candidates:
        return Decided({})
    reopen = {i for i in seen.filled if p_of(seen, i) < F(knobs["threshold_remask"])}
    c = {i: seen.confidence[i] for i in sorted({*seen.candidates, *reopen})}
    chosen = above(c, knobs["threshold"])
    for i in best_first(c):
        if len(chosen) >= len(reopen) + 1:
            break
        chosen.add(i)
    return Decided(take(seen, chosen).write, reopen=reopen)


def p_of(seen: Seen, i: int) -> np.float32:
    z = seen.logits[i].astype(F)
    e = np.exp(z - z.max())
    return F(e[seen.current[i]] / e.sum())


def count_at(step: int, left: int, knobs: Knobs) -> int:
    """Timesteps linspace(1, eps, S + 1), int(masks (1 - s / t)), all at the last."""
    S = int(knobs["steps"])
    if step >= S - 1:
        return left
    slope = (F(1) - F(knobs["eps"])) / F(S)
    return int(F(left) * slope / (F(1) - slope * F(step)))


def first_busy(step: int, left: int, knobs: Knobs) -> int:
    while left and count_at(step, left, knobs) == 0:
        step += 1
    return step


def canvas(score: str) -> Reference:
    """Dream's schedule: each forward takes its next step whose count is not 0."""

    def decide(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
        left = len(seen.candidates)
        # A block that is drawn in the middle of its schedule has had `iteration` busy steps.
        before = memory.get("step", seen.iteration + first_busy(0, seen.entered, knobs))
        step = first_busy(before, left, knobs)
        memory["step"] = step + 1
        values = {
            "entropy": [-h for h in seen.entropy],
            "margin": seen.margin,
            "maskgit_plus": seen.confidence,
        }[score]
        order = best_first(of_candidates(seen, values))
        return take(seen, order[: count_at(step, left, knobs)])

    return decide


def d2f(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    c = of_candidates(seen, seen.confidence)
    return take(seen, {i for i in c if c[i] > F(knobs["threshold"])})


def likelihood(seen: Seen, knobs: Knobs, memory: Memory) -> Decided:
    return threshold(seen, knobs, memory)


REFERENCES: Mapping[str, Reference] = {
    "threshold": threshold,
    "steps": steps("low_confidence"),
    "steps random": steps("random"),
    "steps margin": steps("margin"),
    "steps entropy": steps("entropy"),
    "factor": factor,
    "hierarchical": hierarchical,
    "credit": credit,
    "dynamic": dynamic,
    "edit": edit,
    "remask": remask,
    "entropy": canvas("entropy"),
    "margin": canvas("margin"),
    "maskgit_plus": canvas("maskgit_plus"),
    "d2f": d2f,
    "likelihood": likelihood,
}


def iterate(
    name: str, seen: Seen, knobs: Knobs, memory: Memory, full: bool = True
) -> tuple[list[int], bool]:
    """One iteration: (the block's tokens after it, whether it is done).

    A block that may wait (`full` is False) commits what is above the threshold, or nothing.
    """
    decided = REFERENCES[name](seen, knobs, memory)
    write = decided.write
    c = of_candidates(seen, seen.confidence)
    if not full:
        write = {i: v for i, v in write.items() if c.get(i, F(-1)) > F(knobs["threshold"])}
    elif c and not set(write) & set(c):
        first = best_first(c)[0]
        write = {**write, first: seen.token[first]}
    after = [seen.mask_id if i in decided.reopen else v for i, v in enumerate(seen.current)]
    for i, token in write.items():
        after[i] = token
    return after, seen.mask_id not in after and not decided.more


def choose(
    logits: npt.NDArray[Any], mask_id: int
) -> tuple[list[int], list[Any], list[Any], list[Any]]:
    """Token, confidence, margin, entropy of each row of logits [n, V]: the best but for the mask."""
    tokens, confidences, margins, entropies = [], [], [], []
    for z in np.asarray(logits, np.float64):
        e = np.exp(z - z.max())
        p = e / e.sum()
        open_ = [v for v in range(len(z)) if v != mask_id]
        best = max(open_, key=lambda v: (z[v], -v))
        tokens.append(best)
        confidences.append(F(p[best]))
        first, second = sorted((p[v] for v in open_), reverse=True)[:2]
        margins.append(F(first - second))
        entropies.append(F(-sum(q * np.log(q) for q in p if q > 0)))
    return tokens, confidences, margins, entropies
