"""steps: a fixed number of iterations a block, the same number of tokens in each (LLaDA, 2502.09992)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dcompile.policies.base import Choice, Policy, rank


def quota(choice: Choice, steps: Tensor) -> Tensor:
    """Tokens to commit this iteration, [B]: floor(m / S), one more in the first m mod S, at least 1."""
    total = steps.long().clamp_min(1)
    base = choice.entered // total
    extra = (choice.iteration < choice.entered - base * total).long()
    return (base + extra).clamp_min(1)


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    return rank(choice.confidence) < quota(choice, parameters["steps"])[:, None]


POLICY = Policy("steps", commit, {"steps": 32.0})
