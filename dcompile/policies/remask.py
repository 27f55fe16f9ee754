"""remask: decided tokens that have become unlikely are masked again (dInfer).

A token that was decided early saw mostly masks. When the rest of the block makes it unlikely, the
mask is put back, so that it is decided anew with what is known now (arXiv 2510.08666). Each
forward commits one token more than it reopens, because otherwise two tokens could undo each other
for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import NEVER, Choice, Decision, Policy, rank


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Decision:
    """Filled positions with p(x) < threshold_remask are candidates again, beside `threshold`.

    At least one more commits than was reopened, the most confident first, so that the number of
    masks falls; what is reopened and does not commit becomes a mask.
    """
    assert choice.asked is not None, "remask asks for the current tokens"
    p = choice.asked.probability.amax(-1)
    unfinished = choice.candidate.any(-1)[:, None]
    reopen = choice.filled & (p < parameters["threshold_remask"][:, None]) & unfinished
    open_ = choice.candidate | reopen
    confidence = torch.where(open_, choice.confidence, NEVER)
    least = reopen.sum(-1) + 1
    topped_up = rank(confidence, choice.position) < least[:, None]
    sure = confidence >= parameters["threshold"][:, None]
    wanted = (sure | topped_up) & open_
    return Decision(wanted, reopen=reopen)


def _asks(current: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return current[:, :, None]


POLICY = Policy(
    "remask", commit, {"threshold": 0.9, "threshold_remask": 0.4}, asks=_asks, edits=True
)
