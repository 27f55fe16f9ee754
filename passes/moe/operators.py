"""What each operator computes, element by element, for `Reader`."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from dcompile.ir.edit import axes, value
from dcompile.passes.moe.algebra import (
    Expr,
    Fn,
    Num,
    Plus,
    Ref,
    Same,
    Times,
    Total,
    negate,
    truth,
)
from dcompile.passes.moe.products import PRODUCTS
from dcompile.passes.moe.reading import Handler, Index, Reader
from dcompile.passes.moe.terms import ZERO, Chosen, Const, Term, Var

aten = torch.ops.aten
NEG_INF = -math.inf


def _mul(reader: Reader, node: Node, index: Index) -> Expr:
    return Times(tuple(reader.operand(node, a, index) for a in node.args[:2]))


def _add(reader: Reader, node: Node, index: Index) -> Expr | None:
    """Added up without recursion: a loop over experts is a chain of hundreds."""
    terms: list[Expr] = []
    pending: list[tuple[object, Index, tuple[Expr, ...]]] = [(node, index, ())]
    while pending:
        arg, at, times = pending.pop()
        if isinstance(arg, Node):
            arg, at = reader.locate(arg, at)
            inner = None if arg in reader.leaves else addends(reader, arg, at)
            if inner is not None:
                pending += [(a, reader.broadcast(a, i) if isinstance(a, Node) else (), (*times, *w))
                            for a, i, w in inner]  # fmt: skip
                continue
        found = reader.operand(node, arg, at)
        terms.append(Times((*times, found)) if times else found)
    return Plus(tuple(reversed(terms)))


def addends(
    reader: Reader, node: Node, index: Index
) -> list[tuple[object, Index, tuple[Expr, ...]]] | None:
    """The operands that a node adds up, each with what it is multiplied by."""
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        return [(a, index, ()) for a in node.args[:2]]
    if node.target is aten.where.self:
        # where(c, a + b, a) = a + c b
        condition, changed, kept = node.args
        inner, place = reader.locate(changed, reader.broadcast(changed, index))  # type: ignore
        if inner.target is aten.add.Tensor and isinstance(kept, Node):
            base = reader.locate(kept, reader.broadcast(kept, index))
            for i in (0, 1):
                part = inner.args[i]
                if not isinstance(part, Node):
                    continue
                if reader.locate(part, reader.broadcast(part, place)) == base:
                    when = reader.operand(node, condition, index)
                    return [(kept, index, ()), (inner.args[1 - i], place, (when,))]
    return None


def _sub(reader: Reader, node: Node, index: Index) -> Expr | None:
    if node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = (reader.operand(node, arg, index) for arg in node.args[:2])
    return Plus((a, Times((Num(-1.0), b))))


def _rsub(reader: Reader, node: Node, index: Index) -> Expr:
    a, b = (reader.operand(node, arg, index) for arg in node.args[:2])
    return Plus((b, Times((Num(-1.0), a))))


def _div(reader: Reader, node: Node, index: Index) -> Expr:
    by = node.args[1]
    if isinstance(by, (int, float)):
        return Times((Num(1.0 / by), reader.operand(node, node.args[0], index)))
    below = Fn("reciprocal", (reader.operand(node, by, index),))
    return Times((reader.operand(node, node.args[0], index), below))


def _number(reader: Reader, node: Node, index: Index) -> Expr | None:
    fill = {aten.zeros_like.default: 0.0, aten.zeros.default: 0.0, aten.new_zeros.default: 0.0}
    if node.target in fill:
        return Num(fill[node.target])
    if node.target in (aten.ones_like.default, aten.ones.default):
        return Num(1.0)
    at = 0 if node.target is aten.scalar_tensor.default else 1
    found = node.args[at] if len(node.args) > at else None
    return Num(float(found)) if isinstance(found, (int, float)) else None


def _unary(name: str) -> Handler:
    def read(reader: Reader, node: Node, index: Index) -> Expr:
        return Fn(name, (reader.operand(node, node.args[0], index),))

    return read


def _gelu(reader: Reader, node: Node, index: Index) -> Expr:
    how = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    return Fn(
        "gelu_tanh" if how == "tanh" else "gelu", (reader.operand(node, node.args[0], index),)
    )


def _sum(reader: Reader, node: Node, index: Index) -> Expr | None:
    """sum over axes; any and max along one axis of what is 1 at most once"""
    x = node.args[0]
    assert isinstance(x, Node)
    rank = value(x).dim()
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None or dims == []:
        return None
    along = sorted(axes(dims, rank))
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    place: list[Term] = [t for i, t in enumerate(index) if not (keep and i in along)]
    over: list[Var] = []
    for axis in along:
        var = reader.axis(x, axis)
        over.append(var)
        place.insert(axis, var if reader.sizes(x)[axis] != (False, 1) else ZERO)
    body = reader.element(x, tuple(place))
    for var in reversed(over):
        if reader.sizes(x)[along[over.index(var)]] != (False, 1):
            body = Total(var, body)
    if node.target is aten.sum.dim_IntList or truth(body):
        return body
    return None


def _stack(reader: Reader, node: Node, index: Index) -> Expr | None:
    """The sum over parts of [the index is the part's] its element, where each part is one thick."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(parts, (list, tuple)) and isinstance(dim, int)
    dim %= len(index)
    rest = (*index[:dim], *index[dim + 1 :])
    if node.target is aten.cat.default:
        if any(reader.sizes(p)[dim] != (False, 1) for p in parts):  # type: ignore[arg-type]
            return None
        rest = (*index[:dim], ZERO, *index[dim + 1 :])
    terms = [
        Times((Same(index[dim], Const(i)), reader.element(part, rest)))
        for i, part in enumerate(parts)
    ]
    return Plus(tuple(terms))


def _equal(reader: Reader, node: Node, index: Index) -> Expr | None:
    a, b = node.args[:2]
    terms = [
        reader.term(x, reader.broadcast(x, index) if isinstance(x, Node) else ()) for x in (a, b)
    ]
    equal = node.target in (aten.eq.Tensor, aten.eq.Scalar)
    if terms[0] is not None and terms[1] is not None:
        same = Same(terms[0], terms[1])
        return same if equal else negate(same)
    if b == 0:
        found = reader.operand(node, a, index)
        if truth(found):
            return negate(found) if equal else found
    return None


def _positive(reader: Reader, node: Node, index: Index) -> Expr | None:
    """x > 0, or x >= 1, of what is 0 or 1"""
    limit = (0, 0.5) if node.target is aten.gt.Scalar else (1, 0.5)
    found = reader.operand(node, node.args[0], index)
    return found if node.args[1] in limit and truth(found) else None


def _not(reader: Reader, node: Node, index: Index) -> Expr | None:
    found = reader.operand(node, node.args[0], index)
    return negate(found) if truth(found) else None


def _to_bool(reader: Reader, node: Node, index: Index) -> Expr | None:
    found = reader.operand(node, node.args[0], index)
    return found if truth(found) else None


def _and(reader: Reader, node: Node, index: Index) -> Expr | None:
    found = [reader.operand(node, a, index) for a in node.args[:2]]
    return Times(tuple(found)) if all(truth(f) for f in found) else None


def _choose(when: Expr, a: Expr, b: Expr) -> Expr | None:
    """a where `when`, else b; `only` marks what is -inf elsewhere"""
    if not truth(when):
        return None
    if b == Num(0.0):
        return Times((when, a))
    if a == Num(0.0):
        return Times((negate(when), b))
    if b == Num(NEG_INF):
        return Fn("only", (when, a))
    if a == Num(NEG_INF):
        return Fn("only", (negate(when), b))
    if Num(math.inf) in (a, b):
        return None
    return Plus((Times((when, a)), Times((negate(when), b))))


def _where(reader: Reader, node: Node, index: Index) -> Expr | None:
    if addends(reader, node, index) is not None:
        return _add(reader, node, index)
    return _choose(*(reader.operand(node, a, index) for a in node.args))


def _masked_fill(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, mask, fill = (reader.operand(node, a, index) for a in node.args)
    return _choose(mask, fill, x)


def _one_hot(reader: Reader, node: Node, index: Index) -> Expr | None:
    found = reader.term(node.args[0], index[:-1])
    return None if found is None else Same(found, index[-1])


def _scatter(reader: Reader, node: Node, index: Index) -> Expr | None:
    """sum over j of [index_j = e] src_j, where all index_j of a row are distinct"""
    base, dim, which, src = node.args
    if not isinstance(which, Node) or not isinstance(dim, int):
        return None
    dim %= len(index)
    one = reader.sizes(which)[dim] == (False, 1)
    slot = ZERO if one else reader.axis(which, dim)
    at = (*index[:dim], slot, *index[dim + 1 :])
    found = reader.term(which, at)
    if not isinstance(found, Chosen) or found.place[-1] != slot:
        return None
    start = reader.operand(node, base, index)
    here = Same(found, index[dim])
    given = reader.operand(node, src, at)
    body: Expr = here if given == Num(1.0) else Times((here, given))
    placed = Total(slot, body) if isinstance(slot, Var) else body
    chosen = Total(slot, here) if isinstance(slot, Var) else here
    if start == Num(0.0):
        return placed
    if node.target is aten.scatter_add.default:
        return Plus((start, placed))
    return Fn("only", (chosen, placed)) if start == Num(NEG_INF) else None


def _softmax(reader: Reader, node: Node, index: Index) -> Expr | None:
    """Opaque, but zero where its argument is -inf."""
    argument = reader.element(node.args[0], index)  # type: ignore[arg-type]
    if isinstance(argument, Fn) and argument.name == "only":
        return Times((argument.args[0], Ref(node, index)))
    return None


HANDLERS: dict[object, Handler] = {
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.rsub.Scalar: _rsub,
    aten.div.Tensor: _div,
    aten.neg.default: lambda r, n, i: Times((Num(-1.0), r.operand(n, n.args[0], i))),
    **dict.fromkeys(
        (
            aten.zeros_like.default,
            aten.zeros.default,
            aten.new_zeros.default,
            aten.ones_like.default,
            aten.ones.default,
            aten.full_like.default,
            aten.full.default,
            aten.scalar_tensor.default,
        ),
        _number,
    ),
    aten.silu.default: _unary("silu"),
    aten.relu.default: _unary("relu"),
    aten.sigmoid.default: _unary("sigmoid"),
    aten.tanh.default: _unary("tanh"),
    aten.gelu.default: _gelu,
    **dict.fromkeys((aten.sum.dim_IntList, aten.any.dim, aten.amax.default), _sum),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar), _equal),
    **dict.fromkeys((aten.gt.Scalar, aten.ge.Scalar), _positive),
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _not),
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor), _and),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    aten._to_copy.default: _to_bool,
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.one_hot.default: _one_hot,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.scatter_add.default), _scatter),
    aten.softmax.int: _softmax,
    **dict.fromkeys((aten.stack.default, aten.cat.default), _stack),
    **PRODUCTS,
}
