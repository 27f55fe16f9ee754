"""entropy: Dream's schedule over the whole canvas, the positions of least entropy first.

Dream decides all generated positions together, in timesteps from 1 to eps; of the masks left a
step commits the share that the time passed. Entropy looks at the whole distribution: of two
positions of equal confidence, the one with one rival goes before the one with many (Dream 7B,
arXiv 2508.15487).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import Choice, Policy, rank
from dcompile.policies.steps import score_of


def quota(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """int(masks * (1 - s / t)) for timesteps linspace(1, eps, S + 1), all at the last step. [B]

    A step whose count is 0 changes nothing and is left out.  Only the first ones are such: after a
    step with a count, the masks left have fallen by no larger a share than the time.
    """
    steps, eps = parameters["steps"].long().clamp_min(1).float(), parameters["eps"]
    left = choice.candidate.sum(-1)
    slope = (1.0 - eps) / steps
    # The first count is that of the first step with masks * slope >= t.
    step = choice.iteration.float() - (choice.entered.float() - 1.0 / slope).clamp_max(0.0).floor()
    share = (left.float() * slope / (1.0 - slope * step)).long().clamp_min(1)
    return torch.where(step < steps - 1.0, share, left)


def schedule(name: str, score: str) -> Policy:
    """Dream's policy by one of the scores of `steps`."""

    def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
        place = rank(score_of(choice, score), choice.position)
        return place < quota(choice, parameters)[:, None]

    return Policy(name, commit, {"steps": 512.0, "eps": 1e-3}, canvas=True)


POLICY = schedule("entropy", "entropy")
