"""Cache policies: which rows of a sequence an iteration computes.

Rows that are left out keep the keys and values that they had. A policy is exact where those are
what would be computed now, which is so only under a block-causal mask; everywhere else leaving
rows out is an approximation that the user chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dcompile.errors import OptionError

Rows = tuple[int, int]


@dataclass(frozen=True)
class Moment:
    """What a policy may look at: the block [begin, end) of a sequence, and how far it is."""

    begin: int
    end: int
    total: int
    iteration: int
    """Iterations already done in this block."""
    tick: int
    """Iterations since the request began."""
    previous: int | None
    """Where the block before this one began; None in the first."""
    span: int | None
    """Length of the blocks of a block-causal mask; None where attention is bidirectional."""

    @property
    def floor(self) -> int:
        """The first position that sees what the block's first one sees."""
        return self.begin - self.begin % (self.span or 1)

    @property
    def ceiling(self) -> int:
        """The number of keys that the block's last position sees."""
        if self.span is None:
            return self.total
        return min(self.end + -self.end % self.span, self.total)


CachePolicy = Callable[[Moment], Rows]


def none(at: Moment) -> Rows:
    """Every row that the block can see, every time. Exact."""
    return 0, at.ceiling


def prefix(at: Moment) -> Rows:
    """All rows on entering a block, then those from the block on. Approximate inside a block."""
    return (0 if at.iteration == 0 else at.begin), at.total


def dual(at: Moment) -> Rows:
    """All rows on entering a block, then the block's own. Approximate."""
    return (0, at.total) if at.iteration == 0 else (at.begin, at.end)


def block(at: Moment) -> Rows:
    """The rows of the block, with those of the block before on entering it. Exact.

    The first iteration computes the prompt's whole blocks too; after that, a block's final keys
    and values are computed from its final tokens when the next block is entered.
    """
    if at.iteration > 0:
        return at.floor, at.ceiling
    if at.previous is None:
        return 0, at.ceiling
    return at.previous - at.previous % (at.span or 1), at.ceiling


def vicinity(look_back: int, look_ahead: int, warmup: int) -> CachePolicy:
    """As `dual` with some rows to each side, and all rows while the request warms up."""

    def rows(at: Moment) -> Rows:
        if at.tick < warmup or at.iteration == 0:
            return 0, at.total
        return max(at.begin - look_back, 0), min(at.end + look_ahead, at.total)

    return rows


def periodic(refresh_every: int) -> CachePolicy:
    """As `dual`, with all rows again every so many iterations of a block. Approximate."""

    def rows(at: Moment) -> Rows:
        return (0, at.total) if at.iteration % refresh_every == 0 else (at.begin, at.end)

    return rows


def cache_policy(options: Mapping[str, Any], span: int | None) -> CachePolicy:
    """The policy that options name, for a model with (`span`) or without block-causal attention."""
    name = options.get("cache", "none")
    if name == "none":
        return none
    if name == "block":
        if span is None:
            what = "cache 'block' needs block-causal attention; this model's is bidirectional"
            raise OptionError(what, where="--cache", remedy="use dual, or none to be exact")
        return block
    if name not in ("prefix", "dual", "vicinity", "periodic"):
        known = "none, prefix, dual, vicinity, periodic, block"
        raise OptionError(f"unknown cache {name!r}", where="--cache", remedy=f"use one of {known}")
    if span is not None:
        what = f"cache {name!r} approximates what block-causal attention can have exactly"
        raise OptionError(what, where="--cache", remedy="use block")
    if name == "vicinity":
        look = (_count(options, "look_back"), _count(options, "look_ahead"))
        return vicinity(*look, _count(options, "warmup"))
    if name == "periodic":
        return periodic(_count(options, "refresh_every", least=1))
    return prefix if name == "prefix" else dual


def _count(options: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = options.get(key)
    value = least if value is None else value
    if type(value) is not int or value < least:
        flag = "--" + key.replace("_", "-")
        raise OptionError(f"{value!r} is out of range", where=flag, remedy=f"use {least} or more")
    return value
