"""dynamic: all above the threshold, or the even schedule's share where fewer are (SDAR, LLaDA2).

The even schedule bounds the forwards of a block, and the threshold takes more where the model is
sure. `threshold` alone has no such bound: where nothing is sure it commits one token a forward.
The share is of the block's length over `steps`, as the models' own code has it, also where part of
the block is the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies.base import Choice, Policy, rank
from dcompile.policies.steps import quota


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """confidence > threshold if at least k are, else the k best, or all where fewer are left."""
    sure = choice.confidence > parameters["threshold"][:, None]
    length = torch.full_like(choice.entered, choice.confidence.shape[1])
    share = quota(length, choice, parameters["steps"])
    enough = sure.sum(-1) >= share
    best = rank(choice.confidence, choice.position) < share[:, None]
    return (sure & enough[:, None]) | (best & ~enough[:, None])


POLICY = Policy("dynamic", commit, {"threshold": 0.95, "steps": 32.0})
