"""From logits to written tokens: what one iteration does after the model, for the step and its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dcompile.ir import operators
from dcompile.ir.operators import noise
from dcompile.policies.base import Asked, Choice, Policy, first_best
from dcompile.step.ask_policy import asked_tokens, decide


@dataclass(frozen=True)
class Blocks:
    """The current blocks of B sequences, n positions each, and their clocks, each [B]."""

    current: Tensor  # i64 [B, n]
    position: Tensor  # i64 [B, n]
    iteration: Tensor
    entered: Tensor
    temperature: Tensor
    seed: Tensor
    tick: Tensor
    prompt_end: Tensor | None = (
        None  # where generated positions begin; a policy that edits needs it
    )
    full: Tensor | None = None  # nonzero where a block must make progress; pipelined blocks only


@dataclass(frozen=True)
class Written:
    """What an iteration made of the blocks."""

    updated: Tensor  # i64 [B, n]
    done: Tensor  # bool [B]
    commit: Tensor  # bool [B, n]
    token: Tensor  # i64 [B, n]
    confidence: Tensor  # f32 [B, n]
    state: Mapping[str, Tensor]


def write_tokens(
    policy: Policy,
    mask_id: int,
    logits: Tensor,
    blocks: Blocks,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> Written:
    """Choose, let the policy decide, guarantee progress.  logits [B, n, V] at the blocks' positions."""
    choice = _choose(policy, mask_id, logits, blocks, state)
    decision = decide(policy, choice, parameters)
    candidate = choice.candidate
    live = candidate | choice.filled if policy.edits else candidate
    commit = _progress(decision.commit & live, choice, parameters, blocks.full)
    token = choice.token
    if decision.token is not None:
        token = torch.where(decision.token == mask_id, token, decision.token)
    left = blocks.current
    if decision.reopen is not None:
        left = torch.where(decision.reopen & choice.filled, mask_id, left)
    updated = torch.where(commit, token, left)
    done = (updated != mask_id).all(-1)
    if decision.more is not None:
        done = done & decision.more.logical_not()
    return Written(updated, done, commit, token, choice.confidence, decision.state)


def _choose(
    policy: Policy, mask_id: int, logits: Tensor, at: Blocks, state: Mapping[str, Tensor]
) -> Choice:
    candidate = at.current == mask_id
    filled = candidate.logical_not()
    if at.prompt_end is not None:
        filled = filled & (at.position >= at.prompt_end[:, None])
    live = candidate | filled if policy.edits else candidate
    clock = (at.temperature, at.seed, at.tick, at.position)
    asked = None
    if policy.asks is None:
        found = operators.CHOOSE(logits, live, *clock, mask_id)
    else:
        tokens = asked_tokens(policy, policy.asks, at.current, state)
        *found, score, probability, scores = operators.CHOOSE_ASKED(
            logits, live, *clock, tokens, mask_id
        )
        asked = Asked(tokens, probability, scores, score)
    token, confidence, margin, entropy = found
    chance = noise.uniform(at.seed[:, None], at.tick[:, None], at.position)
    return Choice(
        token,
        confidence,
        margin,
        entropy,
        candidate,
        filled,
        at.current,
        at.position,
        chance,
        at.iteration,
        at.entered,
        at.temperature,
        state,
        asked,
    )


def _progress(
    wanted: Tensor, choice: Choice, parameters: Mapping[str, Tensor], full: Tensor | None
) -> Tensor:
    """A row that would commit no candidate commits its most confident one.

    A pipelined block that is not fully activated commits what is above the threshold, or nothing.
    """
    first = first_best(choice.confidence, choice.candidate, choice.position)
    some = (wanted & choice.candidate).any(-1)
    commit = wanted | (first & some.logical_not()[:, None])
    if full is None:
        return commit
    sure = choice.confidence > parameters["threshold"][:, None]
    return torch.where((full > 0)[:, None], commit, wanted & sure)
