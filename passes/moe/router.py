"""Read off formulas how experts are ranked, and how the chosen ones are weighted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.passes.moe.algebra import (
    Expr,
    Fn,
    NotProven,
    Product,
    Ref,
    Same,
    expand,
    formula,
    subst,
)
from dcompile.passes.moe.operators import HANDLERS
from dcompile.passes.moe.reading import Index, Reader, is_choice
from dcompile.passes.moe.terms import ZERO, Chosen, Term, Var, join, quotient

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        aten.softmax.int,
        aten.sigmoid.default,
        aten.linear.default,
        aten.einsum.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
    }
)


@dataclass(frozen=True)
class Ranking:
    """By what the k best experts are chosen: `scores` [.., E], and `bias` [E] added to them."""

    scores: Node
    bias: Node | None
    groups: int = 1
    kept_groups: int = 1

    @property
    def kind(self) -> str:
        kinds: dict[object, str] = {aten.softmax.int: "softmax", aten.sigmoid.default: "sigmoid"}
        return kinds.get(self.scores.target, "logits")

    @property
    def logits(self) -> Node:
        source = self.scores if self.kind == "logits" else self.scores.args[0]
        assert isinstance(source, Node)
        return source


@dataclass(frozen=True)
class Router:
    """What `route` needs to know."""

    logits: Node
    bias: Node | None
    top_k: int
    score: str
    groups: int
    kept_groups: int
    renormalize: bool
    scale: float


def read_router(reader: Reader, choice: Chosen, number: float, factors: Iterable[Expr]) -> Router:
    """The router that chooses at `choice` and weighs an expert by number * factors."""
    topk, slot = choice.node, choice.place[-1]
    ranked = topk.args[0]
    assert isinstance(ranked, Node)
    if value(ranked).dtype not in (torch.float32, torch.float64):
        kind = str(value(ranked).dtype).removeprefix("torch.")
        raise NotProven(
            f"experts are chosen by scores rounded to {kind}, route compares in float32"
        )
    top_k = _top_k(topk, slot)
    ranking = read_ranking(reader.program, choice)
    given = list(factors)
    try:
        score, renormalize, scale = _weights(reader, choice, ranking, number, given)
    except NotProven:
        if ranking.kind != "logits" or ranking.bias is None:
            raise
        # The weights are of the biased logits: then the bias is a part of the logits.
        ranking = as_it_stands(reader, choice)
        score, renormalize, scale = _weights(reader, choice, ranking, number, given)
    groups = ranking.groups, ranking.kept_groups
    if top_k * ranking.groups > choice.size * ranking.kept_groups:
        raise NotProven(f"{top_k} experts are chosen, more than the kept groups have")
    return Router(ranking.logits, ranking.bias, top_k, score, *groups, renormalize, scale)


def _top_k(topk: Node, slot: Term) -> int:
    if not isinstance(slot, Var):
        return 1
    k = topk.args[1] if topk.target is aten.topk.default else slot.size
    if k != slot.size:
        raise NotProven(f"of the {k} chosen experts {slot.size} are used")
    return slot.size


def read_ranking(program: Program, choice: Chosen) -> Ranking:
    """What the choice compares."""
    reader = Reader(program, (), PRODUCTS, HANDLERS, count=10_000)
    ranked = choice.node.args[0]
    assert isinstance(ranked, Node)
    expert = reader.along(choice.size)
    whole = reader.element(ranked, (*choice.place[:-1], expert))
    inner, groups, kept = whole, 1, 1
    if isinstance(whole, Fn) and whole.name == "only":
        condition, inner = whole.args
        groups, kept = _groups(reader, condition, inner, expert, choice)
    products = expand(inner)
    plain = all(p.number == 1.0 and not p.over and len(p.factors) == 1 for p in products)
    refs = [p.factors[0] for p in products if plain]
    scores = [r for r in refs if isinstance(r, Ref) and len(r.index) > 1]
    biases = [r for r in refs if isinstance(r, Ref) and r.index == (expert,)]
    known = len(scores) == 1 and len(biases) <= 1 and len(refs) == len(scores) + len(biases)
    if known and scores[0].index[-1] == expert and _last_axis(scores[0].node):
        return Ranking(scores[0].node, biases[0].node if biases else None, groups, kept)
    if groups > 1:
        raise NotProven("the experts are not ranked by one score and a bias")
    return as_it_stands(reader, choice)


def as_it_stands(reader: Reader, choice: Chosen) -> Ranking:
    """Whatever is compared, it can be called logits."""
    ranked = choice.node.args[0]
    assert isinstance(ranked, Node)
    return Ranking(_source(reader, ranked, (*choice.place[:-1], choice)), None)


def _source(reader: Reader, node: Node, index: Index) -> Node:
    """What `node` is a view of; itself where the view puts the experts in another order."""
    found, place = reader.locate(node, index)
    return found if place[-1] == index[-1] else node


def _last_axis(node: Node) -> bool:
    rank = value(node).dim()
    return node.target is not aten.softmax.int or node.args[1] in (-1, rank - 1)


def _groups(
    reader: Reader, condition: Expr, inner: Expr, expert: Term, choice: Chosen
) -> tuple[int, int]:
    """(groups, kept groups) of: only where the expert's group is among the best by its two best."""
    try:
        (product,) = expand(condition)
        (same,) = product.factors
        slot: Term = product.over[0] if product.over else ZERO
        kept = slot.size if isinstance(slot, Var) else 1
        _require(product.number == 1.0 and len(product.over) <= 1 and isinstance(same, Same))
        terms = (same.a, same.b)  # type: ignore[attr-defined]
        (best,) = [t for t in terms if isinstance(t, Chosen)]
        (group,) = [t for t in terms if t is not best]
        size = choice.size // best.size
        _require(best.place[-1] == slot and size * best.size == choice.size)
        if not isinstance(expert, Var):
            raise ValueError
        _require(group == quotient(expert, size) and best.node.args[1] == kept)
        at = reader.along(best.size)
        sums = reader.element(best.node.args[0], (*best.place[:-1], at))  # type: ignore[arg-type]
        _check_sums(expand(sums), expand(inner), expert, at, size)
    except ValueError:
        raise NotProven(
            "experts are left out before the choice, and not by groups of the best two"
        ) from None
    return best.size, kept


def _require(condition: object) -> None:
    if not condition:
        raise ValueError


def _check_sums(
    totals: list[Product], inner: list[Product], expert: Var, at: Term, size: int
) -> None:
    """A group's score: sum over i < 2 of what ranks the i-th best expert of the group."""
    _require(len(totals) == len(inner))
    for total in totals:
        (i,), (factor,) = total.over, total.factors
        _require(i.size == min(2, size) and isinstance(factor, Ref))
        index = factor.index  # type: ignore[attr-defined]
        (best,) = {c for t in index for c in _choices(t)}
        _require(best.place[-1] == i and best.place[-2] == at and best.size == size)
        _require(is_choice(best.node) and best.node.args[1] == i.size)
        member = join(at, best, size)
        alike = [
            p for p in inner if p.number == total.number and len(p.factors) == 1 and not p.over
        ]
        _require(any(subst(p.factors[0], expert, member) == factor for p in alike))


def _choices(term: Term) -> list[Chosen]:
    if isinstance(term, Chosen):
        return [term]
    parts = [getattr(term, name) for name in ("high", "low", "of") if hasattr(term, name)]
    return [c for part in parts for c in _choices(part)]


def _weights(
    reader: Reader, choice: Chosen, ranking: Ranking, number: float, factors: list[Expr]
) -> tuple[str, bool, float]:
    """(score, whether it is divided by its sum, scale) of an expert's weight."""
    below = [f for f in factors if isinstance(f, Fn) and f.name == "reciprocal"]
    scores = [f for f in factors if f not in below]
    if len(scores) != 1 or len(below) > 1:
        what = "no score" if not scores else f"{len(scores)} factors"
        raise NotProven(f"an expert's weight is {what}, not one score of the router")
    (mine,) = scores
    kind, renormalize = _kind(reader, choice, ranking, mine)
    if not below:
        return kind, renormalize, number
    slot = choice.place[-1]
    by, slack = 0.0, 0.0
    for product in expand(below[0].args[0]):
        if not product.over and not product.factors:
            slack = product.number
            continue
        terms, over = list(product.factors), list(product.over)
        if isinstance(slot, Var) and len(over) == 1 and over[0].size == slot.size:
            var = over.pop()
            terms = [subst(f, var, slot) for f in terms]
        if over or by or terms != [mine]:
            raise NotProven("the weights are divided by something else than their sum")
        by = product.number
    most = 1e-9 if kind.startswith("softmax") else 1e-12
    if not by or not 0 <= slack <= most * abs(by):
        raise NotProven("the weights are divided by something else than their sum")
    return kind, True, number / by


def _kind(reader: Reader, choice: Chosen, ranking: Ranking, mine: Expr) -> tuple[str, bool]:
    """Which of route's scores a weight is, and whether it adds up to one already."""
    logits = ranking.logits
    if isinstance(mine, Fn) and mine.name == "sigmoid" and _is(mine.args[0], logits, choice):
        kind = {"sigmoid": "sigmoid", "logits": "sigmoid_by_logits"}.get(ranking.kind)
        if kind is not None:
            return kind, False
    if isinstance(mine, Ref):
        if _is(mine, ranking.scores, choice) and ranking.kind != "logits":
            return ranking.kind, False
        target, source = mine.node.target, mine.node.args[0] if mine.node.args else None
        if target is aten.sigmoid.default and _same_place(reader, source, mine, logits, choice):
            return "sigmoid_by_logits", False
        if target is aten.softmax.int and _last_axis(mine.node):
            if _same_place(reader, source, mine, logits, choice) and mine.index[-1] == choice:
                return "softmax_by_logits", False
            if _of_chosen(reader, mine, logits, choice):
                return ("softmax", True) if ranking.kind == "softmax" else ("softmax_chosen", False)
    raise NotProven("an expert's weight is not the softmax or sigmoid by which it is chosen")


def _is(x: Expr, node: Node, choice: Chosen) -> bool:
    """node[.., row, the chosen expert]"""
    if not isinstance(x, Ref):
        (product, *more) = expand(x) or [Product(0.0)]
        if more or product.number != 1.0 or product.over or len(product.factors) != 1:
            return False
        (x,) = product.factors
    if not isinstance(x, Ref) or x.node is not node or x.index[-1] != choice:
        return False
    rows = {t for t in choice.place[:-1] if t != ZERO}
    return {t for t in x.index[:-1] if t != ZERO} == rows


def _same_place(reader: Reader, source: object, mine: Ref, logits: Node, choice: Chosen) -> bool:
    if not isinstance(source, Node) or mine.index[-1] != choice:
        return False
    node, index = reader.locate(source, mine.index)
    base, place = reader.locate(logits, mine.index)
    return node is base and index[-1] == place[-1] == choice


def _of_chosen(reader: Reader, mine: Ref, logits: Node, choice: Chosen) -> bool:
    """A softmax over the chosen logits only: along the slots, or -inf elsewhere."""
    source = mine.node.args[0]
    assert isinstance(source, Node)
    base = _base(reader, logits, choice)
    slot = choice.place[-1]
    if mine.index[-1] == slot:
        if value(source).shape[-1] != (slot.size if isinstance(slot, Var) else 1):
            return False  # over more than those used
        return _is(reader.element(source, mine.index), base, choice)
    if mine.index[-1] != choice:
        return False
    expert = reader.fresh(choice.size)
    whole = reader.element(source, (*mine.index[:-1], expert))
    if not (isinstance(whole, Fn) and whole.name == "only"):
        return False
    there = expand(whole.args[0])
    if len(there) != 1 or [v.size for v in there[0].over] != (
        [slot.size] if isinstance(slot, Var) else []
    ):
        return False
    last = there[0].over[0] if there[0].over else slot
    at = Chosen(choice.node, (*choice.place[:-1], last), choice.size)
    if there[0].factors not in ((Same(at, expert),), (Same(expert, at),)):
        return False
    return _is(formula(expand(subst(whole.args[1], expert, choice))), base, choice)


def _base(reader: Reader, logits: Node, choice: Chosen) -> Node:
    """The node that a reader of the logits refers to."""
    rank = value(logits).dim()
    place = reader.whole(logits)
    assert len(place) == rank
    return _source(reader, logits, place)
