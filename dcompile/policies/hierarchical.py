"""hierarchical: the best of each run of masks, if it is half sure, beside all that are sure (dInfer).

Errors of tokens that are decided together come from their depending on each other, and neighbours
depend most. One token from each run of masks is far from the others, so half a certainty may do
for it; it also splits the run, which makes more runs for the next forward (arXiv 2510.08666).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import NEVER, Choice, Policy, first_best


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """c > threshold, or c > threshold_low and the maximum of its run of masks, or the global best."""
    high, low = (parameters[name][:, None] for name in ("threshold", "threshold_low"))
    peak = choice.confidence >= run_maximum(choice)
    best = first_best(choice.confidence, choice.candidate, choice.position)
    half = peak & (choice.confidence > low)
    return half | (choice.confidence > high) | best


def run_maximum(choice: Choice) -> Tensor:
    """Of each candidate, the largest confidence in its maximal run of candidates. [B, n]"""
    open_, at = choice.candidate, choice.position
    # Candidates are in one run where equally many decided positions come before them.
    earlier = at[:, None, :] < at[:, :, None]
    run = (earlier & open_.logical_not()[:, None, :]).sum(-1)
    together = (run[:, :, None] == run[:, None, :]) & open_[:, None, :]
    return torch.where(together, choice.confidence[:, None, :], NEVER).amax(-1)


POLICY = Policy("hierarchical", commit, {"threshold": 0.92, "threshold_low": 0.62})
