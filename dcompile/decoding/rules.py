"""Which policies, managers and caches go together: one table of rules, with reasons.

The compiler refuses by it, the documentation's table of cells and the tests read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dcompile.errors import OptionError
from dcompile.options import CACHES, MANAGERS
from dcompile.policies import Policy, find_policy

__all__ = [
    "CACHES",
    "MANAGERS",
    "RULES",
    "Combination",
    "Rule",
    "allowed",
    "check_together",
    "refused",
]


class HasBlocks(Protocol):
    """A ModelSpec, or what else says the block length of a block-causal mask."""

    @property
    def block_length(self) -> int | None: ...


@dataclass(frozen=True)
class Combination:
    """What is to be put together; `span` is the block length of a block-causal mask, or None."""

    policy: Policy
    manager: str
    cache: str
    span: int | None
    smoothing: bool = False
    aligned: bool | None = None
    cross_block: bool = True
    shift: bool = False


@dataclass(frozen=True)
class Rule:
    """A kind of combination that makes no sense, and why."""

    applies: Callable[[Combination], bool]
    reason: str
    remedy: str


RULES = (
    Rule(
        lambda c: c.cache == "block" and c.span is None,
        "cache 'block' is for block-causal models; this one attends in both directions",
        "--cache dual, prefix or none",
    ),
    Rule(
        lambda c: c.cache not in ("block", "none") and c.span is not None,
        "this cache approximates what a block-causal model can have exactly",
        "--cache block, which is exact",
    ),
    Rule(
        lambda c: c.cache == "active" and c.policy.edits,
        "cache 'active' has no rows of decided positions, which this policy looks at again",
        "--cache dual, or a policy that decides once",
    ),
    Rule(
        lambda c: c.manager == "canvas" and c.span is not None,
        "a block-causal model was trained to decide a block after the blocks that it sees, not all at once",
        "--manager blockwise or pipelined",
    ),
    Rule(
        lambda c: c.aligned is False and c.span is not None,
        "a block-causal model's blocks begin at multiples of its block length",
        "leave --unaligned out",
    ),
    Rule(
        lambda c: c.aligned is True and c.manager == "canvas",
        "the whole canvas is one block, which begins where the prompt ends",
        "leave --aligned out",
    ),
    Rule(
        lambda c: c.manager == "pipelined" and c.span is None,
        "pipelined blocks need a block-causal mask: here the blocks before would see the later ones",
        "--manager blockwise or canvas",
    ),
    Rule(
        lambda c: c.manager == "pipelined" and c.policy.edits,
        "this policy changes decided positions, but pipelined blocks advance by how many are decided",
        "--policy d2f, threshold, hierarchical or dynamic",
    ),
    Rule(
        lambda c: c.manager == "pipelined" and bool(c.policy.state),
        "this policy remembers one block a sequence, and pipelined blocks are several",
        "--policy d2f, threshold, hierarchical or dynamic",
    ),
    Rule(
        lambda c: c.manager == "pipelined" and "threshold" not in c.policy.parameters,
        "a block that is half activated commits what is above the threshold; this policy has none",
        "--policy d2f, threshold, hierarchical or dynamic",
    ),
    Rule(
        lambda c: c.manager == "pipelined" and not c.cross_block,
        "a pipelined block is stored by the next iteration, which runs the blocks after it too",
        "leave --no-cross-block out",
    ),
    Rule(
        lambda c: c.smoothing and c.shift,
        "smoothing mixes what a row predicts into the same position; this model's rows predict the next",
        "leave --smoothing out",
    ),
    Rule(
        lambda c: c.policy.name == "likelihood" and (c.smoothing or c.manager != "blockwise"),
        "policy 'likelihood' scores blocks of plain masks",
        "--manager blockwise, without --smoothing",
    ),
)


def refused(combination: Combination) -> Rule | None:
    """The first rule that the combination breaks."""
    return next((rule for rule in RULES if rule.applies(combination)), None)


def allowed(
    policy: str | Policy,
    manager: str,
    cache: str,
    spec: HasBlocks,
    *,
    smoothing: bool = False,
    shift: bool = False,
) -> str | None:
    """Why the three do not go together for a model, in a sentence; None where they do.

    Raises OptionError for a name that nothing has.
    """
    for name, known in ((manager, MANAGERS), (cache, CACHES)):
        if name not in known:
            raise OptionError(f"there is no {name!r}", remedy=f"one of {', '.join(known)}")
    found = policy if isinstance(policy, Policy) else find_policy(policy)
    span = spec.block_length
    rule = refused(Combination(found, manager, cache, span, smoothing, shift=shift))
    return None if rule is None else rule.reason


def check_together(combination: Combination) -> None:
    """Raise OptionError where a rule is broken."""
    rule = refused(combination)
    if rule is not None:
        c = combination
        with_ = f"policy {c.policy.name}, manager {c.manager}, cache {c.cache}"
        raise OptionError(rule.reason, where=with_, remedy=rule.remedy)
