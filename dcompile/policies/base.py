"""What a decoding policy is: a plain torch function that is traced into the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """What a policy sees of the current blocks: B sequences, n positions each.

    token i64 [B, n]: the model's choice; confidence, margin, entropy f32 [B, n] of that choice, -inf
    (entropy 0) where the position is no candidate; candidate bool [B, n]: still the mask; iteration
    i64 [B]: forwards done in this block before this one; entered i64 [B]: masks on entering it.
    """

    token: Tensor
    confidence: Tensor
    margin: Tensor
    entropy: Tensor
    candidate: Tensor
    iteration: Tensor
    entered: Tensor


Commit = Callable[[Choice, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Policy:
    """Which candidates commit this iteration.

    `commit(choice, parameters)` returns bool [B, n]; it treats each row by itself, and its result is
    cut to the candidates.  `parameters` are the run-time knobs with their defaults; each arrives as
    f32 [B].  The step adds the progress guarantee: the most confident candidate of a row that would
    commit none.
    """

    name: str
    commit: Commit
    parameters: Mapping[str, float] = field(default_factory=dict)


def rank(score: Tensor) -> Tensor:
    """Rank of each position in its row, 0 for the highest score; the first wins a tie. [B, n]"""
    mine, other = score[:, :, None], score[:, None, :]
    n = score.shape[1]
    place = Tensor.new_ones(score, n, n).tril(-1)  # place[i, j] = 1 where j < i
    ahead = (other > mine) | ((other == mine) & (place > 0))
    return ahead.sum(-1)
