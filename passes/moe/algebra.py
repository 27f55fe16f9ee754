"""The value of one element of a tensor as a formula, and its normal form: a sum of products.

Variables stand for indices; `Same` is 1 where two indices are equal and 0 elsewhere.  A sum over a
variable that an equation fixes is taken: sum_e [e = e_j] f(e) = f(e_j).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from itertools import product as pairs

from torch.fx import Node

from dcompile.passes.moe.terms import ROWS, Chosen, Const, Term, Var, mentions, replace_var

LIMIT = 4000  # products of one formula
_names = count(1_000_000)


class NotProven(Exception):
    """Why a place is not, or not provably, a mixture of experts."""

    near: int = 0  # how much of one was seen


@dataclass(frozen=True)
class Expr:
    """A number that depends on index variables."""


@dataclass(frozen=True)
class Num(Expr):
    value: float


@dataclass(frozen=True)
class Ref(Expr):
    """An element of a node's value that is not looked into."""

    node: Node
    index: tuple[Term, ...]


@dataclass(frozen=True)
class Fn(Expr):
    """A function of numbers, by name."""

    name: str
    args: tuple[Expr, ...]


@dataclass(frozen=True)
class Same(Expr):
    a: Term
    b: Term


@dataclass(frozen=True)
class Times(Expr):
    factors: tuple[Expr, ...]


@dataclass(frozen=True)
class Plus(Expr):
    terms: tuple[Expr, ...]


@dataclass(frozen=True)
class Total(Expr):
    """The sum of `body` over all values of `var`."""

    var: Var
    body: Expr


@dataclass(frozen=True)
class Product:
    """number * sum over `over` of the product of `factors`"""

    number: float
    over: tuple[Var, ...] = ()
    factors: tuple[Expr, ...] = ()


Guard = tuple[Chosen, Term]  # an equation known to hold


def subst(x: Expr, var: Var, new: Term) -> Expr:
    """`x` with `new` for the free variable."""
    if isinstance(x, Ref):
        return Ref(x.node, tuple(replace_var(t, var, new) for t in x.index))
    if isinstance(x, Fn):
        return Fn(x.name, tuple(subst(a, var, new) for a in x.args))
    if isinstance(x, Same):
        return Same(replace_var(x.a, var, new), replace_var(x.b, var, new))
    if isinstance(x, Times):
        return Times(tuple(subst(f, var, new) for f in x.factors))
    if isinstance(x, Plus):
        return Plus(tuple(subst(t, var, new) for t in x.terms))
    if isinstance(x, Total):
        return x if x.var == var else Total(x.var, subst(x.body, var, new))
    return x


def uses(x: Expr, what: object) -> bool:
    """Whether a variable, or the node of a choice, stands in the formula."""
    if isinstance(x, Ref):
        return any(mentions(t, what) for t in x.index)
    if isinstance(x, Same):
        return mentions(x.a, what) or mentions(x.b, what)
    return any(uses(part, what) for part in parts(x))


def parts(x: Expr) -> tuple[Expr, ...]:
    if isinstance(x, Fn):
        return x.args
    if isinstance(x, Times):
        return x.factors
    if isinstance(x, Plus):
        return x.terms
    return (x.body,) if isinstance(x, Total) else ()


def expand(x: Expr, known: tuple[Guard, ...] = ()) -> list[Product]:
    """The normal form, like products added up; `known` equations hold."""
    merged: dict[tuple[tuple[Var, ...], tuple[Expr, ...]], float] = {}
    for item in _multiply_out(x):
        settled = settle(item, known)
        if settled is not None:
            key = (settled.over, settled.factors)
            merged[key] = merged.get(key, 0.0) + settled.number
    return [Product(number, *key) for key, number in merged.items() if number]


def _multiply_out(x: Expr) -> list[Product]:
    if isinstance(x, Num):
        return [Product(x.value)] if x.value else []
    if isinstance(x, Plus):
        return [p for term in x.terms for p in _multiply_out(term)]
    if isinstance(x, Total):
        # A name of its own: the same sum may stand beside this one, or inside a function in it.
        var = Var(next(_names), x.var.size)
        body = _multiply_out(subst(x.body, x.var, var))
        return [Product(p.number, (var, *p.over), p.factors) for p in body]
    if isinstance(x, Times):
        out = [Product(1.0)]
        for factor in x.factors:
            out = [_product(a, b) for a, b in pairs(out, _multiply_out(factor))]
            if len(out) > LIMIT:
                raise NotProven("the formula of its output has too many products")
        return out
    return [Product(1.0, (), (x,))]


def _product(a: Product, b: Product) -> Product:
    return Product(a.number * b.number, (*a.over, *b.over), (*a.factors, *b.factors))


def settle(item: Product, known: tuple[Guard, ...] = ()) -> Product | None:
    """Use the product's equations; None where one is false, and so the product is zero."""
    while True:
        step = _use_one_equation(item, known)
        if step is None:
            return None
        if step is item:
            break
        item = step
    guards = [*known, *(g for f in item.factors if (g := guard(f)) is not None)]
    factors = tuple(_inside(f, tuple(guards)) for f in item.factors)
    used = [v for v in item.over if any(uses(f, v) for f in factors)]
    number = item.number
    for var in item.over:
        if var not in used:
            if var.size == ROWS:
                raise NotProven("it adds up over positions")
            number *= var.size
    return Product(number, tuple(used), factors)


def _inside(x: Expr, known: tuple[Guard, ...]) -> Expr:
    """A function's arguments in normal form."""
    if not isinstance(x, Fn):
        return x
    return Fn(x.name, tuple(formula(expand(a, known)) for a in x.args))


def formula(items: Iterable[Product]) -> Expr:
    """A normal form as a formula again; equal ones have equal names, by how deep they are nested."""
    terms: list[Expr] = []
    for item in items:
        depth = 1 + max((_depth(f) for f in item.factors), default=0)
        for i, var in enumerate(item.over):
            named = Var(-1000 * depth - i, var.size)
            over = tuple(named if v == var else v for v in item.over)
            factors = tuple(subst(f, var, named) for f in item.factors)
            item = Product(item.number, over, factors)
        number = () if item.number == 1.0 else (Num(item.number),)
        body: Expr = Times((*number, *item.factors))
        for var in reversed(item.over):
            body = Total(var, body)
        terms.append(body)
    return Plus(tuple(terms))


def _depth(x: Expr) -> int:
    inner = max((_depth(p) for p in parts(x)), default=0)
    return inner + isinstance(x, (Fn, Total))


def guard(x: Expr) -> Guard | None:
    """(choice, expert) of a factor [choice = expert] that stays."""
    if isinstance(x, Same):
        for a, b in ((x.a, x.b), (x.b, x.a)):
            if isinstance(a, Chosen) and isinstance(b, (Const, Var)):
                return a, b
    return None


def _use_one_equation(item: Product, known: tuple[Guard, ...]) -> Product | None:
    held: list[Guard] = list(known)
    for i, factor in enumerate(item.factors):
        if not isinstance(factor, Same):
            continue
        rest = (*item.factors[:i], *item.factors[i + 1 :])
        a, b = factor.a, factor.b
        if a == b:
            return Product(item.number, item.over, rest)
        if isinstance(a, Const) and isinstance(b, Const):
            return None
        for var, term in ((a, b), (b, a)):
            if isinstance(var, Var) and var in item.over and not mentions(term, var):
                if isinstance(term, Const) and not 0 <= term.value < var.size:
                    return None
                if _range(term) is None or _range(term) > var.size:  # type: ignore[operator]
                    continue
                over = tuple(v for v in item.over if v != var)
                return Product(item.number, over, tuple(subst(f, var, term) for f in rest))
        if isinstance(a, Chosen) and isinstance(b, Chosen) and _alike(a, b):
            swapped = Same(a.place[-1], b.place[-1])
            return Product(item.number, item.over, (*rest, swapped))
        found = guard(factor)
        if found is None:
            continue
        choice, expert = found
        if isinstance(expert, Const) and expert.value >= choice.size:
            return None
        for other, its in held:
            if its == expert and _alike(other, choice):
                swapped = Same(other.place[-1], choice.place[-1])
                return Product(item.number, item.over, (*rest, swapped))
            if other == choice and isinstance(its, Const) and isinstance(expert, Const):
                return None
        held.append(found)
    return item


def _range(term: Term) -> int | None:
    """How many values an index can take, where that is known."""
    if isinstance(term, Const):
        return term.value + 1
    return term.size or None if isinstance(term, (Var, Chosen)) else None


def _alike(a: Chosen, b: Chosen) -> bool:
    """Two results of one choice: equal only where their places are."""
    return a.node is b.node and a.place[:-1] == b.place[:-1]


def truth(x: Expr) -> bool:
    """Whether the formula can only be 0 or 1."""
    if isinstance(x, Same):
        return True
    if isinstance(x, Num):
        return x.value in (0.0, 1.0)
    if isinstance(x, Times):
        return all(truth(f) for f in x.factors)
    if isinstance(x, Plus) and len(x.terms) == 2 and x.terms[0] == Num(1.0):
        negative = x.terms[1]
        if isinstance(negative, Times) and negative.factors[0] == Num(-1.0):
            return all(truth(f) for f in negative.factors[1:])
    if isinstance(x, Total) and isinstance(x.body, Same):
        # A row's choices are distinct, so at most one of them is a given expert.
        for a, b in ((x.body.a, x.body.b), (x.body.b, x.body.a)):
            if isinstance(a, Chosen) and a.place[-1] == x.var and not mentions(b, x.var):
                return not any(mentions(t, x.var) for t in a.place[:-1])
            if a == x.var and not mentions(b, x.var):
                return True
    return False


def negate(x: Expr) -> Expr:
    """1 - x of a truth."""
    return Plus((Num(1.0), Times((Num(-1.0), x))))
