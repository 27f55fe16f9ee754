"""edit: `threshold` for masks, and decided tokens are overwritten by surer ones (LLaDA2.1).

A low threshold for masks is fast and wrong at times; a model that was trained to correct tokens
mends that later, when it sees more of the text. So speed comes from the first threshold and
quality from the second. For models trained for it only: what others say of a decided position is
worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dcompile.policies.base import Choice, Decision, Policy, State


def commit(choice: Choice, parameters: Mapping[str, Tensor]) -> Decision:
    """Beside `threshold`: filled positions whose choice differs and has p > threshold_edit.

    After the last mask it goes on until nothing changes, or for post_steps iterations.
    """
    fill = choice.candidate & (choice.confidence >= parameters["threshold"][:, None])
    likely = choice.confidence > parameters["threshold_edit"][:, None]
    full = choice.candidate.any(-1).logical_not()
    # A block that ended by post_steps stays as it is, also where the host looks only later.
    ended = full & (choice.state["post"] >= parameters["post_steps"])
    edit = choice.filled & (choice.token != choice.current) & likely & ended.logical_not()[:, None]
    count = choice.state["post"] + full.float()
    more = (count < parameters["post_steps"]) & (edit.any(-1) | full.logical_not())
    return Decision(fill | edit, more=more, state={"post": count})


def _one(n: int) -> tuple[int, ...]:
    return ()


POLICY = Policy(
    "edit",
    commit,
    {"threshold": 0.7, "threshold_edit": 0.5, "post_steps": 16.0},
    state={"post": State(_one)},
    edits=True,
)
