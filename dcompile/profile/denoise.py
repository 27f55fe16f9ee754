"""The course of a generation: when each position was decided, and how many tokens a forward gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcompile.profile.watch import Seen


@dataclass(frozen=True)
class Decision:
    """A token that an iteration wrote; a position may be decided again where a policy edits."""

    position: int
    iteration: int
    token: int
    confidence: float | None


@dataclass(frozen=True)
class Course:
    """One prompt's generation; iterations are counted over all prompts together."""

    prompt: int
    begin: int
    """The first generated position."""
    end: int
    first: int
    last: int
    """Iterations that the prompt took part in."""
    decisions: list[Decision]


def courses(seen: Sequence[Seen], prompts: Sequence[Sequence[int]], length: int) -> list[Course]:
    """What became of each prompt, whose generated positions are the `length` after it."""
    found: list[list[Decision]] = [[] for _ in prompts]
    spans: list[tuple[int, int]] = [(len(seen), 0) for _ in prompts]
    for at, step in enumerate(seen):
        for slot, prompt in step.prompts.items():
            spans[prompt] = (min(spans[prompt][0], at), at)
            begin, end = len(prompts[prompt]), len(prompts[prompt]) + length
            changed = step.before[slot, begin:end] != step.after[slot, begin:end]
            for position in begin + np.flatnonzero(changed):
                found[prompt].append(_decision(step, at, slot, int(position)))
    return [
        Course(prompt, len(ids), len(ids) + length, *spans[prompt], found[prompt])
        for prompt, ids in enumerate(prompts)
    ]


def _decision(step: Seen, at: int, slot: int, position: int) -> Decision:
    confidence = float(step.confidence[slot, position])
    known = round(confidence, 6) if np.isfinite(confidence) else None
    return Decision(position, at, int(step.after[slot, position]), known)


def masks_left(step: Seen, prompts: Sequence[Sequence[int]], length: int, mask_id: int) -> int:
    """Undecided positions of the prompts in flight, after an iteration."""
    return sum(
        int((step.after[slot, len(prompts[p]) : len(prompts[p]) + length] == mask_id).sum())
        for slot, p in step.prompts.items()
    )


def decided(step: Seen, prompts: Sequence[Sequence[int]], length: int) -> int:
    """Tokens that an iteration wrote."""
    return sum(
        int((step.after[slot, b : b + length] != step.before[slot, b : b + length]).sum())
        for slot, b in ((slot, len(prompts[p])) for slot, p in step.prompts.items())
    )
