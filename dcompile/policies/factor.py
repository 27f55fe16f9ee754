"""factor: the longest run of best candidates whose confidence grows with its length (Fast-dLLM)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dcompile.policies.base import Choice, Policy, rank


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """Rank 1 is free, rank r needs c >= 1 - f / (r + 1); the longest prefix that satisfies all."""
    place = rank(choice.confidence, choice.position)  # 0 is rank 1
    need = 1.0 - parameters["factor"][:, None] / (place + 2).float()
    fails = (choice.confidence < need) & (place > 0)
    n = place.shape[1]
    first_failure = (fails.logical_not() * n + fails * place).amin(-1)
    return place < first_failure[:, None]


POLICY = Policy("factor", commit, {"factor": 1.0})
