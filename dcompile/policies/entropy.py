"""entropy: Dream's schedule over the whole canvas, the positions of least entropy first.

Dream decides all generated positions together, in timesteps from 1 to eps; of the masks left a
step commits the share that the time passed. Entropy looks at the whole distribution: of two
positions of equal confidence, the one with one rival goes before the one with many (Dream 7B,
arXiv 2508.15487).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dcompile.policies.base import Choice, Policy, rank
from dcompile.policies.steps import score_of


def quota(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """int(masks * (1 - s / t)) for timesteps linspace(1, eps, S + 1), all at the last step. [B]"""
    steps, eps = parameters["steps"].long().clamp_min(1), parameters["eps"]
    left = choice.candidate.sum(-1)
    slope = (1.0 - eps) / steps.float()
    t = 1.0 - slope * choice.iteration.float()
    share = (left.float() * slope / t).long()
    # At its last step, and after it, everything.
    last = (choice.iteration >= steps - 1).long()
    return share * (1 - last) + left * last


def schedule(name: str, score: str) -> Policy:
    """Dream's policy by one of the scores of `steps`."""

    def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
        place = rank(score_of(choice, score), choice.position)
        return place < quota(choice, parameters)[:, None]

    return Policy(name, commit, {"steps": 512.0, "eps": 1e-3}, canvas=True)


POLICY = schedule("entropy", "entropy")
