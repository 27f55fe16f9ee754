"""A decoding policy of one's own: commit what is sure, or what was predicted twice in a row.

dcompile compile MODEL --policy docs/my_policy.py:steady -o model.dcx
dcompile run model.dcx --prompt "..." --set threshold_steady=0.4
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcompile.policies import Choice, Decision, Policy, State


def sure(choice: Choice, parameters: Mapping[str, Tensor]) -> Tensor:
    """The shortest kind: a function of the choice, bool [B, n]; no parameters, no memory."""
    return choice.confidence > 0.9


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Decision:
    """With parameters (f32 [B], set by request) and memory (zero when a block is entered)."""
    # Tokens are kept plus one, so that zero is no token.
    same = choice.state["last"] == choice.token + 1
    steady = same & (choice.confidence > parameters["threshold_steady"][:, None])
    wanted = (choice.confidence > parameters["threshold"][:, None]) | steady
    last = torch.where(choice.candidate, choice.token + 1, 0)
    return Decision(wanted, state={"last": last})


steady = Policy(
    "steady",
    commit,
    {"threshold": 0.9, "threshold_steady": 0.5},
    state={"last": State(lambda n: (n,), torch.int64)},
)
