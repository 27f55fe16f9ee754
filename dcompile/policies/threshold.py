"""threshold: commit every candidate as confident as the threshold (Fast-dLLM, arXiv 2505.22618)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import Choice, Policy


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """confidence >= min(threshold, best - 1e-5): at least the best commits."""
    best = choice.confidence.amax(-1)
    bar = torch.minimum(parameters["threshold"], best - 1e-5)
    return choice.confidence >= bar[:, None]


POLICY = Policy("threshold", commit, {"threshold": 0.9})
