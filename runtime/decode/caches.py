"""Cache policies: which rows of a sequence an iteration computes.

Rows that are left out keep the keys and values that they had. A policy is exact where those are
what would be computed now, which is so only under a block-causal mask; everywhere else leaving
rows out is an approximation that the user chose.

Why it works at all: between two forwards few tokens change, and keys and values change little with
them (Fast-dLLM, arXiv 2505.22618). Why it must be repaired now and then: what was computed while a
position held the mask says nothing of the token that stands there now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.errors import OptionError

Ints = npt.NDArray[np.int64]
Rows = tuple[int, int] | Ints
"""A range of positions, or the positions themselves in ascending order (the last may repeat)."""
_UNIT = 8
"""`active` runs whole units of rows, so that few different numbers of rows are prepared."""
CACHES = ("none", "prefix", "dual", "vicinity", "periodic", "active", "block")
EXACT = ("none", "block")
"""Caches whose tokens are those of every row computed every time."""


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
    ids: Ints
    """The block's tokens, [n]."""
    before: Ints
    """Those that the iteration before this one read, [n]."""
    mask_id: int
    shift: int
    """How many positions before its own a token is predicted: 0 or 1."""

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
    """Every row that the block can see, every time. Exact.

    Nothing is kept, so nothing can be old: the others are measured against this one. It costs the
    most, because every forward computes the whole sequence.
    """
    return 0, at.ceiling


def prefix(at: Moment) -> Rows:
    """All rows on entering a block, then those from the block on. Approximate inside a block.

    What stands before the block is decided, so its keys change only by what the block's tokens do
    to them; what stands behind it is masks, whose keys follow every token, and is computed each
    time. Fast-dLLM's prefix cache (arXiv 2505.22618).
    """
    return (0 if at.iteration == 0 else at.begin), at.total


def dual(at: Moment) -> Rows:
    """All rows on entering a block, then the block's own. Approximate.

    Why all rows on entering: the keys of the block that was just finished were computed while it
    still held masks, and the rows before and behind it have seen neither its tokens nor each other
    since. One full pass repairs all of that, and it costs no forward of its own, because it
    decides tokens too. Inside a block the rows outside of it are old by at most the tokens of that
    block. Fast-dLLM's DualCache (arXiv 2505.22618).
    """
    return (0, at.total) if at.iteration == 0 else (at.begin, at.end)


def block(at: Moment) -> Rows:
    """The rows of the block, with those of the block before on entering it. Exact.

    The first iteration computes the prompt's whole blocks too; after that, a block's final keys
    and values are computed from its final tokens when the next block is entered.

    Why it is exact: under a block-causal mask no row sees a later block, so what a decided block
    holds cannot change any more. Its last keys were computed while it held masks, so it runs once
    more, and that costs no forward because it runs beside the next block (LLaDA2, SDAR; D2F, arXiv
    2508.09192).
    """
    if at.iteration > 0:
        return at.floor, at.ceiling
    if at.previous is None:
        return 0, at.ceiling
    return at.previous - at.previous % (at.span or 1), at.ceiling


def vicinity(look_back: int, look_ahead: int, warmup: int) -> CachePolicy:
    """As `dual` with some rows to each side, and all rows while the request warms up.

    Why the sides: rows near the block attend to it most, so their keys change most by its tokens,
    and a few rows more cost little. Why the warm-up: in the first forwards most of the canvas is
    masks, and each token that is decided changes all of it. dInfer (arXiv 2510.08666).
    """

    def rows(at: Moment) -> Rows:
        if at.tick < warmup or at.iteration == 0:
            return 0, at.total
        return max(at.begin - look_back, 0), min(at.end + look_ahead, at.total)

    return rows


def periodic(refresh_every: int) -> CachePolicy:
    """As `dual`, with all rows again every so many iterations of a block. Approximate.

    It bounds how old a key can be: by so many forwards, where `dual` lets it grow with the block's
    length. So it is for long blocks; with 1 it is `none`.
    """

    def rows(at: Moment) -> Rows:
        return (0, at.total) if at.iteration % refresh_every == 0 else (at.begin, at.end)

    return rows


def active(at: Moment) -> Rows:
    """As `dual`, then only the block's undecided positions and what the last iteration changed.

    A decided position's keys and values stay as they were one iteration after it was decided.
    Approximate. Rows are filled up to whole units by repeating the last, which writes the same bits.

    Why what changed runs once more: its keys are of the mask that stood there, and the undecided
    rows are about to attend to it. Why no more than once: its own token stays, and what others
    still do to it is what `dual` leaves out for all rows outside of the block. No paper; our own.
    """
    if at.iteration == 0:
        return 0, at.total
    deciding = np.flatnonzero(at.ids == at.mask_id) + at.begin
    changed = np.flatnonzero(at.ids != at.before) + at.begin
    predicting = np.maximum(deciding - at.shift, 0)
    rows = np.union1d(np.union1d(deciding, changed), predicting)
    missing = -len(rows) % _UNIT
    return np.concatenate((rows, np.full(missing, rows[-1]))) if missing else rows


def stored_block(at: Moment) -> Rows:
    """As `block` where the block before was stored by a forward of its own. Exact.

    One forward a block more; in return, no forward runs the rows of two blocks.
    """
    first = at.iteration == 0 and at.previous is None
    return 0 if first else at.floor, at.ceiling


def cache_policy(options: Mapping[str, Any], span: int | None) -> CachePolicy:
    """The policy that options name, for a model with (`span`) or without block-causal attention."""
    name = options.get("cache", "none")
    if name == "none":
        return none
    if name not in CACHES:
        known = ", ".join(CACHES)
        raise OptionError(f"unknown cache {name!r}", where="cache", remedy=f"use one of {known}")
    if name == "block":
        if span is None:
            what = "cache 'block' needs block-causal attention; this model's is bidirectional"
            raise OptionError(what, where="cache", remedy="use dual, or none to be exact")
        return stored_block if stores_blocks(options) else block
    if span is not None:
        what = f"cache {name!r} approximates what block-causal attention can have exactly"
        raise OptionError(what, where="cache", remedy="use block")
    if name == "vicinity":
        look = (_count(options, "look_back"), _count(options, "look_ahead"))
        return vicinity(*look, _count(options, "warmup"))
    if name == "periodic":
        return periodic(_count(options, "refresh_every", least=1))
    return {"prefix": prefix, "dual": dual, "active": active}[name]


def reads_tokens(policy: CachePolicy) -> bool:
    """Whether the rows depend on the tokens so far, so that no iteration's are known ahead."""
    return policy is active


def stores_blocks(options: Mapping[str, Any]) -> bool:
    """Whether a finished block is run once more to store it, in place of the cross-block update."""
    return options.get("cache") == "block" and options.get("cross_block") is False


def _count(options: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = options.get(key)
    value = least if value is None else value
    if type(value) is not int or value < least:
        raise OptionError(f"{value!r} is out of range", where=key, remedy=f"use {least} or more")
    return value
