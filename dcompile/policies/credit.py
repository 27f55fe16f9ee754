"""credit: tokens that a position keeps predicting gain on the others (dInfer, arXiv 2510.08666).

K <- beta K, K[i, t_i] += c_i^gamma, z' = z + alpha ln(1 + K), then `threshold` on z'.  A position has
predicted few tokens, so K is kept as (token, credit) pairs: p' of any token follows from p and the
probabilities of the pairs' tokens, and no credited token loses to one without credit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import LAST, NEVER, Choice, Decision, Policy, State, first_best

# A block of n positions is done in n iterations, so n pairs hold everything that a position has
# predicted. In longer blocks the pair that gives way has lost all but beta^64 of its credit.
PAIRS = 64


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Decision:
    alpha, beta, gamma = (parameters[name][:, None] for name in ("alpha", "beta", "gamma"))
    asked = choice.asked
    assert asked is not None, "credit asks for its pairs"
    known = choice.state["credit_token"]
    credit = choice.state["credit"] * beta[:, :, None]
    gain = torch.where(choice.candidate, choice.confidence.clamp_min(0.0).pow(gamma), 0.0)
    same = (known == choice.token[:, :, None]) & (credit > 0)
    new = _place(credit) & same.any(-1).logical_not()[:, :, None] & (gain > 0)[:, :, None]
    token = torch.where(new, choice.token[:, :, None], known)
    credit = torch.where(new, 0.0, credit)
    credit = credit + torch.where(new | same, gain[:, :, None], 0.0)

    p = torch.where(new, choice.confidence[:, :, None], asked.probability)
    score = torch.where(new, asked.choice_score[:, :, None], asked.score)
    boost = (1.0 + credit).pow(alpha[:, :, None])
    raised = torch.where(credit > 0, p * boost, 0.0)
    whole = 1.0 + torch.where(credit > 0, p * (boost - 1.0), 0.0).sum(-1)
    t = choice.temperature[:, None, None]
    lift = alpha[:, :, None] * (1.0 + credit).log() / torch.where(t > 0, t, 1.0)
    fused = torch.where(credit > 0, score + lift, NEVER)
    chosen, confidence = _best(fused, token, raised / whole[:, :, None])
    # A choice of probability 0 has no credit: it stands as it is.
    some = (credit > 0).any(-1)
    confidence = torch.where(some, confidence, choice.confidence)
    confidence = torch.where(choice.candidate, confidence, NEVER)
    state = {"credit_token": token, "credit": credit}
    # The best after the credit, which need not be the best of `choice`.
    best = first_best(confidence, choice.candidate, choice.position)
    wanted = (confidence >= parameters["threshold"][:, None]) | best
    return Decision(wanted, token=torch.where(some, chosen, choice.token), state=state)


def _place(credit: Tensor) -> Tensor:
    """Where a new pair goes: the first of the least credit, which is an empty one while there is any."""
    index = torch.arange(credit.shape[-1])
    least = credit <= credit.amin(-1)[:, :, None]
    return index == torch.where(least, index, LAST).amin(-1)[:, :, None]


def _best(score: Tensor, token: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Token of the highest score, the lowest of equals, and its probability. [B, n]"""
    top = score >= score.amax(-1)[:, :, None]
    chosen = torch.where(top, token, LAST).amin(-1)
    return chosen, torch.where(top & (token == chosen[:, :, None]), p, NEVER).amax(-1)


def _asks(current: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return state["credit_token"]


def _pairs(n: int) -> tuple[int, ...]:
    return n, min(n, PAIRS)


POLICY = Policy(
    "credit",
    commit,
    {"threshold": 0.9, "alpha": 0.7, "beta": 0.8, "gamma": 0.2},
    state={"credit_token": State(_pairs, torch.int64), "credit": State(_pairs)},
    asks=_asks,
)
