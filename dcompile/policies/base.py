"""What a decoding policy is: a plain torch function that is traced into the step."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dcompile.errors import PolicyError

NEVER = float("-inf")


@dataclass(frozen=True)
class Choice:
    """What a policy sees of the current blocks: B sequences, n positions each.

    A position is *live* where the model's choice was computed: the candidates, and for a policy that
    edits the filled positions too.  Elsewhere token is -1, confidence and margin -inf, entropy 0.
    """

    token: Tensor  # i64 [B, n], the model's choice, never the mask id
    confidence: Tensor  # f32 [B, n], its probability
    margin: Tensor  # f32 [B, n], difference of the two largest probabilities
    entropy: Tensor  # f32 [B, n], of the distribution, in nats
    candidate: Tensor  # bool [B, n], still the mask
    filled: Tensor  # bool [B, n], decided before this iteration, and no part of the prompt
    current: Tensor  # i64 [B, n], ids as they are now
    position: Tensor  # i64 [B, n], in the sequence, ascending
    chance: Tensor  # f32 [B, n], uniform in (0, 1), of the request's own stream
    iteration: Tensor  # i64 [B], forwards done in this block before this one
    entered: Tensor  # i64 [B], masks on entering it
    temperature: Tensor  # f32 [B]
    state: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # [B, *shape], as the last call left it
    asked: Asked | None = None  # only for a policy that asks


@dataclass(frozen=True)
class Asked:
    """What the model says of S tokens a position that the policy named, and of its own choice.

    A score is the logit, at a temperature t > 0 logit / t plus the token's noise: the largest one
    is the choice.
    """

    token: Tensor  # i64 [B, n, S]
    probability: Tensor  # f32 [B, n, S]
    score: Tensor  # f32 [B, n, S]
    choice_score: Tensor  # f32 [B, n]


@dataclass(frozen=True)
class Decision:
    """What a policy wants; the step cuts it to the live positions and guarantees progress."""

    commit: Tensor  # bool [B, n], write the token here
    token: Tensor | None = None  # i64 [B, n], instead of the model's choice
    reopen: Tensor | None = None  # bool [B, n], filled positions that become masks unless committed
    more: Tensor | None = None  # bool [B], go on although no mask is left
    state: Mapping[str, Tensor] = field(default_factory=dict)  # [B, *shape], for the next call


@dataclass(frozen=True)
class State:
    """Memory of a policy, zero at first: one tensor of `shape(block_length)` a sequence."""

    shape: Callable[[int], tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    reset: Literal["block", "request"] = "block"  # when it is zero again


Commit = Callable[[Choice, Mapping[str, Tensor]], Tensor | Decision]
Asks = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Policy:
    """Which candidates commit this iteration.

    `commit(choice, parameters)` returns bool [B, n], or a Decision; it treats each row by itself, and
    its result is cut to the candidates.  `parameters` are the run-time knobs with their defaults; each
    arrives as f32 [B].  The step adds the progress guarantee: the most confident candidate of a row
    that would commit none.
    """

    name: str
    commit: Commit
    parameters: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, State] = field(default_factory=dict)
    asks: Asks | None = None  # (current ids [B, n], state) -> tokens [B, n, S] to be told about
    edits: bool = False  # sees filled positions as well, and may change them
    canvas: bool = False  # made for all generated positions at once, not for a block


def blame(name: str, place: tuple[str, int], error: Exception) -> PolicyError:
    """The error of a policy that raised one, at the last line in its own file that led there.

    `place` is the file and the line that stands for all of it.
    """
    file, line = place
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file and frame.lineno is not None:
            line = frame.lineno
    kind, said = type(error).__name__, str(error).strip().partition("\n")[0]
    remedy = "correct it there; docs/decoding.md says what a policy is given and returns"
    if "DataDependent" in kind:
        what, remedy = "decides by values that are not there yet", "select with masks (torch.where)"
    else:
        what = "raises " + (f"{kind}: {said}" if said else kind)
    return PolicyError(f"policy {name!r} {what}", where=f"{file}:{line}", remedy=remedy)


def rank(score: Tensor, position: Tensor) -> Tensor:
    """Rank of each position in its row, 0 for the highest score; the first wins a tie. [B, n]"""
    mine, other = score[:, :, None], score[:, None, :]
    before = position[:, None, :] < position[:, :, None]
    ahead = (other > mine) | ((other == mine) & before)
    return ahead.sum(-1)


def first_best(score: Tensor, among: Tensor, position: Tensor) -> Tensor:
    """The one position of each row with the highest score among some; none where there are none."""
    best = torch.where(among, score, NEVER).amax(-1)
    tied = among & (score >= best[:, None])
    first = torch.where(tied, position, LAST).amin(-1)
    return tied & (position == first[:, None])


LAST = 1 << 62  # after every position
