"""likelihood: `threshold` that also tells the log-probability of tokens named by the host, for scoring.

A diffusion model has no likelihood token by token, only a bound: mask some tokens of a text at
random, ask how likely each of them is, and average (LLaDA, 2502.09992). The host puts the masks
and says which tokens it asks about; the step answers, so the logits of a vocabulary never leave
it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import Choice, Decision, Policy, State


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Decision:
    """`told` is ln p of the `wanted` tokens at the candidates, 0 elsewhere."""
    asked = choice.asked
    assert asked is not None, "likelihood asks for the wanted tokens"
    # By the difference of scores, so that no small probability becomes 0.
    behind = asked.score[:, :, 0] - asked.choice_score
    confidence = torch.where(choice.candidate, choice.confidence, 1.0)
    told = torch.where(choice.candidate, behind + confidence.log(), 0.0)
    state = {"wanted": choice.state["wanted"], "told": told}
    return Decision(choice.confidence >= parameters["threshold"][:, None], state=state)


def _asks(current: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return state["wanted"][:, :, None]


def _one(n: int) -> tuple[int, ...]:
    return (n,)


POLICY = Policy(
    "likelihood",
    commit,
    {"threshold": 0.9},
    state={"wanted": State(_one, torch.int64, reset="request"), "told": State(_one)},
    asks=_asks,
)
