"""threshold: commit every candidate as confident as the threshold (Fast-dLLM, arXiv 2505.22618).

Tokens that are decided together are drawn as if they were independent. That is right where each of
them is nearly certain, because then the joint distribution is nearly the product; so the more
certain the model is, the more tokens a forward may commit. The best one commits always, or nothing
would end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import Choice, Policy


def sure(confidence: Tensor, threshold: Tensor) -> Tensor:
    """confidence >= min(threshold, best - 1e-5): at least the best. [B, n]"""
    best = confidence.amax(-1)
    return confidence >= torch.minimum(threshold, best - 1e-5)[:, None]


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    return sure(choice.confidence, parameters["threshold"])


POLICY = Policy("threshold", commit, {"threshold": 0.9})
