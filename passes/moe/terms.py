"""Indices of tensors as terms: which element of which tensor an element of another one is."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

ROWS = 0  # size of an axis that runs along the sequence


@dataclass(frozen=True)
class Term:
    """An integer that depends on index variables."""


@dataclass(frozen=True)
class Const(Term):
    value: int


@dataclass(frozen=True)
class Var(Term):
    """An index variable over [0, size); `size` is ROWS along the sequence."""

    number: int
    size: int


@dataclass(frozen=True)
class Chosen(Term):
    """What topk (or a sort) `node` put at `place`: an index below `size`.

    At one place of all axes but the last, different last indices give different results.
    """

    node: Node
    place: tuple[Term, ...]
    size: int


@dataclass(frozen=True)
class Joined(Term):
    """high * size + low, 0 <= low < size"""

    high: Term
    low: Term
    size: int


@dataclass(frozen=True)
class Quotient(Term):
    of: Term
    by: int


@dataclass(frozen=True)
class Remainder(Term):
    of: Term
    by: int


@dataclass(frozen=True)
class Shifted(Term):
    of: Term
    by: int


ZERO = Const(0)


def join(high: Term, low: Term, size: int) -> Term:
    if high == ZERO:
        return low
    if size == 1:
        return high
    if isinstance(high, Const) and isinstance(low, Const):
        return Const(high.value * size + low.value)
    if isinstance(high, Quotient) and low == Remainder(high.of, size) and high.by == size:
        return high.of
    return Joined(high, low, size)


def quotient(of: Term, by: int) -> Term:
    if by == 1:
        return of
    if isinstance(of, Const):
        return Const(of.value // by)
    if isinstance(of, (Var, Chosen)) and of.size != ROWS and of.size <= by:
        return ZERO
    if isinstance(of, Joined):
        if of.size % by == 0:
            return join(of.high, quotient(of.low, by), of.size // by)
        if by % of.size == 0:
            return quotient(of.high, by // of.size)
    return Quotient(of, by)


def remainder(of: Term, by: int) -> Term:
    if by == 1:
        return ZERO
    if isinstance(of, Const):
        return Const(of.value % by)
    if isinstance(of, (Var, Chosen)) and of.size != ROWS and of.size <= by:
        return of
    if isinstance(of, Joined):
        if of.size % by == 0:
            return remainder(of.low, by)
        if by % of.size == 0:
            return join(remainder(of.high, by // of.size), of.low, of.size)
    return Remainder(of, by)


def shift(of: Term, by: int) -> Term:
    if isinstance(of, Const):
        return Const(of.value + by)
    if isinstance(of, Shifted):
        return shift(of.of, of.by + by)
    return Shifted(of, by) if by else of


def replace_var(term: Term, var: Var, new: Term) -> Term:
    """`term` with `new` for `var`."""
    if term == var:
        return new
    if isinstance(term, Chosen):
        return Chosen(term.node, tuple(replace_var(t, var, new) for t in term.place), term.size)
    if isinstance(term, Joined):
        high, low = replace_var(term.high, var, new), replace_var(term.low, var, new)
        return join(high, low, term.size)
    if isinstance(term, Quotient):
        return quotient(replace_var(term.of, var, new), term.by)
    if isinstance(term, Remainder):
        return remainder(replace_var(term.of, var, new), term.by)
    if isinstance(term, Shifted):
        return shift(replace_var(term.of, var, new), term.by)
    return term


def mentions(term: Term, what: object) -> bool:
    """Whether `what`, a variable or the node of a choice, is in the term."""
    if isinstance(term, Chosen):
        return term.node is what or any(mentions(t, what) for t in term.place)
    if isinstance(term, Joined):
        return mentions(term.high, what) or mentions(term.low, what)
    if isinstance(term, (Quotient, Remainder, Shifted)):
        return mentions(term.of, what)
    return term == what


Size = tuple[bool, int]  # whether it is a multiple of the number of rows, and the other factor
UNIT: Size = (False, 1)


def reindex(outer: list[Size], inner: list[Size], index: tuple[Term, ...]) -> list[Term] | None:
    """Where element `index` of a reshape to `outer` lies in a tensor of shape `inner`.

    None where the axes do not pair, or where a row's values would not stay side by side.
    """
    given = [(t, s) for t, s in zip(index, outer, strict=True) if s != UNIT]
    wanted = [i for i, s in enumerate(inner) if s != UNIT]
    out: list[Term] = [ZERO] * len(inner)
    while given and wanted:
        group, axes = [given.pop(0)], [wanted.pop(0)]
        left, right = group[0][1], inner[axes[0]]
        while left != right:
            if left[1] < right[1] or (left[1] == right[1] and right[0]):
                if not given or given[0][1][0]:
                    return None
                group.append(given.pop(0))
                left = (left[0], left[1] * group[-1][1][1])
            else:
                if not wanted or inner[wanted[0]][0]:
                    return None
                axes.append(wanted.pop(0))
                right = (right[0], right[1] * inner[axes[-1]][1])
        flat = group[0][0]
        for term, size in group[1:]:
            flat = join(flat, term, size[1])
        for axis in reversed(axes[1:]):
            out[axis] = remainder(flat, inner[axis][1])
            flat = quotient(flat, inner[axis][1])
        out[axes[0]] = flat
    return None if given or wanted else out
