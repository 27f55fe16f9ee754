"""steps: a fixed number of iterations a block, the same number of tokens in each (LLaDA, 2502.09992).

What the model was trained for: going from all masks to none in even steps. It looks at how sure
the model is only to rank positions, so time is known ahead and quality is bought by the step; the
reference that `threshold` and the others are measured against is this one with a token a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.errors import OptionError
from dcompile.policies.base import NEVER, Choice, Policy, rank

SCORES = ("low_confidence", "random", "margin", "entropy")


def quota(many: Tensor, choice: Choice, steps: Tensor) -> Tensor:
    """Of `many` tokens in S steps, this one's: floor(many / S), +1 in the first many mod S. [B]

    At least 1.
    """
    total = steps.long().clamp_min(1)
    base = many // total
    extra = (choice.iteration < many - base * total).long()
    return (base + extra).clamp_min(1)


def score_of(choice: Choice, score: str) -> Tensor:
    """How much a position is wanted, [B, n], -inf where it is no candidate."""
    values = {
        "low_confidence": choice.confidence,
        "random": choice.chance,
        "margin": choice.margin,
        "entropy": -choice.entropy,
    }
    return torch.where(choice.candidate, values[score], NEVER)


def steps(score: str) -> Policy:
    """The policy by one of SCORES; raises OptionError."""
    if score not in SCORES:
        raise OptionError(
            f"there is no score named {score!r}",
            where="score",
            remedy=f"one of {', '.join(SCORES)}",
        )

    def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
        place = rank(score_of(choice, score), choice.position)
        return place < quota(choice.entered, choice, parameters["steps"])[:, None]

    return Policy("steps", commit, {"steps": 32.0})


POLICY = steps("low_confidence")
