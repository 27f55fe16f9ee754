"""factor: the longest run of best candidates whose confidence grows with its length (Fast-dLLM).

The bound behind `threshold`, used as it is: n tokens may be taken together without changing the
greedy answer if each is surer than 1 - 1 / (n + 1) (arXiv 2505.22618). So two tokens need less
than ten do, where one threshold for both is too strict for the two or too loose for the ten.
"""

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
