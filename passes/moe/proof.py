"""The proof that a value is a mixture of the chosen experts, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from dcompile.ir.edit import value
from dcompile.passes.moe.algebra import (
    Expr,
    Guard,
    NotProven,
    Num,
    Plus,
    Product,
    Ref,
    Same,
    Times,
    expand,
    guard,
    parts,
    subst,
    uses,
)
from dcompile.passes.moe.experts import Expert, Weighted, read_expert
from dcompile.passes.moe.operators import addends
from dcompile.passes.moe.reading import Index, Reader
from dcompile.passes.moe.router import Router, read_router
from dcompile.passes.moe.terms import ROWS, ZERO, Chosen, Const, Term, Var


@dataclass(frozen=True)
class Mixture:
    """sum over slots of the weighted, chosen experts, plus `rest`; experts in the router's order."""

    router: Router
    experts: list[Expert]
    rest: list[Node]


def prove(reader: Reader, choice: Node, root: Node, cone: Mapping[Node, None]) -> Mixture:
    """What `root` is made of; NotProven, with how near it came, where it is no such mixture."""
    index = reader.whole(root)
    rows = [t for t in index if isinstance(t, Var) and t.size == ROWS]
    out = index[-1]
    if len(rows) != 1 or not isinstance(out, Var) or out.size == ROWS:
        raise NotProven("it is no value of rows and features")
    body, rest = _split(reader, root, index, cone)
    products = expand(body)
    routed = [p for p in products if any(uses(f, choice) for f in p.factors)]
    if not routed or not any(_weights(reader, p) for p in routed):
        raise NotProven("the choice weighs no experts")
    try:
        return _mixture(reader, choice, products, rows[0], out, rest)
    except NotProven as failure:
        failure.near = sum(_weights(reader, p) for p in routed)
        raise


def _weights(reader: Reader, product: Product) -> int:
    return sum(
        isinstance(f, Ref) and f.node.name in reader.program.recipes and value(f.node).dim() > 1
        for f in product.factors
    )


def _split(
    reader: Reader, root: Node, index: Index, cone: Mapping[Node, None]
) -> tuple[Expr, list[Node]]:
    """(what depends on the choice, whole values that are only added to it)"""
    terms: list[Expr] = []
    rest: list[Node] = []
    pending: list[tuple[object, Index, tuple[Expr, ...]]] = [(root, index, ())]
    while pending:
        arg, at, times = pending.pop()
        if not isinstance(arg, Node):
            if arg:
                raise NotProven("a number is added to the experts' output")
            continue
        node, place = reader.locate(arg, at)
        inner = addends(reader, node, place) if node in cone else None
        if inner is not None:
            for a, i, w in inner:
                spread = reader.broadcast(a, i) if isinstance(a, Node) else ()
                pending.append((a, spread, (*times, *w)))
            continue
        if arg not in cone and not times:
            # Zeros to begin with, the residual, a shared expert: values that exist as they are.
            if reader.element(node, place) == Num(0.0):
                continue
            if at == reader.broadcast(arg, index):
                rest.append(arg)
                continue
        found = reader.element(node, place)
        terms.append(Times((*times, found)))
    return Plus(tuple(reversed(terms))), rest[::-1]


def _mixture(
    reader: Reader, choice: Node, products: list[Product], row: Var, out: Var, rest: list[Node]
) -> Mixture:
    by_expert: dict[int, list[Product]] = {}
    place: Chosen | None = None
    slot = reader.fresh(0)
    for product in products:
        key, at, settled = _by_slot(choice, product, slot)
        if place is not None and at != place:
            raise NotProven("the choice is used at two different places")
        place = at
        by_expert.setdefault(key, []).append(settled)
    assert place is not None
    slot = place.place[-1]  # type: ignore[assignment]
    if any(t not in (row, ZERO) for t in place.place[:-1]):
        raise NotProven("a row uses the choice of another")
    if -1 in by_expert and len(by_expert) > 1:
        raise NotProven("some experts are chosen twice, by their own part and among all")
    count = place.size
    if -1 not in by_expert and sorted(by_expert) != list(range(count)):
        missing = sorted(set(range(count)) - set(by_expert))
        raise NotProven(f"of the router's {count} experts, {missing[:4]} contribute nothing")
    found: list[Weighted] = []
    for key in sorted(by_expert):
        known: tuple[Guard, ...] = ((place, Const(key)),) if key >= 0 else ()
        found.append(read_expert(reader.program, by_expert[key], place, out, known))
    _alike(found, row)
    factors = [f for f, times in found[0].factors for _ in range(times)]
    router = read_router(reader, place, found[0].number, factors)
    experts = [w.expert for w in found]
    return Mixture(router, experts * count if -1 in by_expert else experts, rest)


def _by_slot(choice: Node, product: Product, slot: Var) -> tuple[int, Chosen, Product]:
    """(the expert, -1 for whichever was chosen; the choice; the product without its condition)"""
    guards = [
        (f, g) for f in product.factors if (g := guard(f)) is not None and g[0].node is choice
    ]
    left = product.factors
    key = -1
    if guards:
        factor, (at, expert) = guards[0]
        if len(guards) > 1 or not isinstance(expert, Const):
            raise NotProven("an expert is used under several conditions")
        left = tuple(f for f in left if f is not factor)
        key = expert.value
    else:
        # Others are inside of sums of their own: of the weights, of masks.
        places = {c for f in left for c in _choices(f, choice) if _is_free(c, product)}
        if len(places) != 1:
            raise NotProven(
                "a part of it does not depend on the choice" if not places
                else "an expert is weighted by what another was chosen with"
            )  # fmt: skip
        (at,) = places
    if any(isinstance(f, Same) for f in left):
        raise NotProven("an expert is used under a condition that is not its choice")
    was = at.place[-1]
    if was == ZERO and (choice.target is torch.ops.aten.sort.default or slots(choice) == 1):
        return key, at, replace(product, factors=left)
    if not isinstance(was, Var) or was not in product.over:
        raise NotProven("only some of the chosen experts are used")
    new = replace(slot, size=was.size)
    over = tuple(new if v == was else v for v in product.over)
    factors = tuple(subst(f, was, new) for f in left)
    at = replace(at, place=(*at.place[:-1], new))
    return key, at, Product(product.number, over, factors)


def slots(choice: Node) -> int:
    """How many a choice puts in order."""
    return int(choice.meta["val"][0].shape[-1])


def _is_free(choice: Chosen, product: Product) -> bool:
    slot = choice.place[-1]
    return not isinstance(slot, Var) or slot in product.over


def _choices(x: Expr, node: Node) -> set[Chosen]:
    """Where the choice is used in a formula."""
    terms: tuple[Term, ...] = ()
    if isinstance(x, Ref):
        terms = x.index
    elif isinstance(x, Same):
        terms = (x.a, x.b)
    found = {t for t in terms if isinstance(t, Chosen) and t.node is node}
    for part in parts(x):
        found |= _choices(part, node)
    return found


def _shape(expert: Expert) -> tuple[int, int, bool, bool]:
    """Its widths, and which of its projections have no bias."""
    biases = (expert.gate_bias is None, expert.down_bias is None)
    return (expert.gate.rows, expert.down.rows, *biases)


def _alike(found: list[Weighted], row: Var) -> None:
    """All experts read one x, act alike, and are weighted alike."""
    first = found[0]
    x = first.expert.x
    if any(t not in (row, ZERO) for t in x.index[:-1]) or x.index.count(row) != 1:
        raise NotProven("the experts read another row than the one they write")
    dtypes = set()
    for item in found:
        expert = item.expert
        if expert.x.node is not x.node or expert.x.index[:-1] != x.index[:-1]:
            raise NotProven("the experts do not read the same value")
        if expert.activation != first.expert.activation:
            raise NotProven("the experts' activations differ")
        if (item.number, item.factors) != (first.number, first.factors):
            raise NotProven("the experts are not weighted alike")
        if _shape(expert) != _shape(first.expert):
            raise NotProven("the experts differ in width or in biases")
        views = (expert.gate, expert.up, expert.down)
        dtypes |= {value(v.node).dtype for v in views}
    if dtypes != {value(x.node).dtype}:
        kinds = sorted(str(d).removeprefix("torch.") for d in {*dtypes, value(x.node).dtype})
        raise NotProven(f"the experts' input and weights have different dtypes: {', '.join(kinds)}")
    if value(x.node).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotProven(f"there are no kernels for {value(x.node).dtype}")
