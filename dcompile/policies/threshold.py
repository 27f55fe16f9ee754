"""threshold: commit every candidate as confident as the threshold (Fast-dLLM, arXiv 2505.22618).

Tokens that are decided together are drawn as if they were independent. That is right where each of
them is nearly certain, because then the joint distribution is nearly the product; so the more
certain the model is, the more tokens a forward may commit. Where no candidate is, the best one
commits alone, or nothing would end.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dcompile.policies.base import Choice, Policy


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """c >= threshold; the step's progress guarantee adds the best of a row that commits none."""
    return choice.confidence >= parameters["threshold"][:, None]


POLICY = Policy("threshold", commit, {"threshold": 0.9})
