"""Products of tensors, element by element: sums over the indices that the result does not have."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcompile.ir.edit import value
from dcompile.passes.moe.algebra import Expr, NotProven, Plus, Times, Total
from dcompile.passes.moe.reading import Handler, Index, Reader
from dcompile.passes.moe.terms import ZERO, Term, Var

aten = torch.ops.aten


def _product_of(reader: Reader, terms: list[str], out: str, args: list[Node], index: Index) -> Expr:
    """einsum: one index variable a letter"""
    sizes = {
        letter: size
        for term, arg in zip(terms, args, strict=True)
        for letter, size in zip(term, reader.sizes(arg), strict=True)
        if size != (False, 1)
    }
    places: dict[str, Term] = dict(zip(out, index, strict=True))
    over: list[Var] = []
    for letter in sorted(set("".join(terms)) - set(out)):
        if letter not in sizes:
            places[letter] = ZERO
            continue
        if sizes[letter][0]:
            raise NotProven("it adds up over positions")
        over.append(reader.fresh(sizes[letter][1]))
        places[letter] = over[-1]
    factors = [
        reader.element(arg, reader.broadcast(arg, tuple(places[c] for c in term)))
        for term, arg in zip(terms, args, strict=True)
    ]
    body: Expr = Times(tuple(factors))
    for var in reversed(over):
        body = Total(var, body)
    return body


def _einsum(reader: Reader, node: Node, index: Index) -> Expr | None:
    terms, _, out = str(node.args[0]).replace(" ", "").partition("->")
    if "." in terms or not out or any(len(set(t)) < len(t) for t in terms.split(",")):
        return None
    return _product_of(reader, terms.split(","), out, list(node.args[1]), index)  # type: ignore


def _linear(reader: Reader, node: Node, index: Index) -> Expr:
    x, weight, *rest = node.args
    assert isinstance(x, Node) and isinstance(weight, Node)
    bias = rest[0] if rest else node.kwargs.get("bias")
    rows = "abcdefgh"[: value(x).dim() - 1]
    made = _product_of(reader, [rows + "k", "nk"], rows + "n", [x, weight], index)
    return made if bias is None else Plus((made, reader.operand(node, bias, index)))


def _matmul(reader: Reader, node: Node, index: Index) -> Expr | None:
    """Products of matrices, batch axes broadcast."""
    first = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
    a, b = node.args[first : first + 2]
    assert isinstance(a, Node) and isinstance(b, Node)
    dims = value(a).dim(), value(b).dim()
    if min(dims) < 2 or node.kwargs:
        return None
    batch = "abcdefgh"[: max(dims) - 2]
    terms = [batch[len(batch) + 2 - dims[0] :] + "mk", batch[len(batch) + 2 - dims[1] :] + "kn"]
    made = _product_of(reader, terms, batch + "mn", [a, b], index)
    return made if not first else Plus((made, reader.operand(node, node.args[0], index)))


PRODUCTS: dict[object, Handler] = {
    aten.einsum.default: _einsum,
    aten.linear.default: _linear,
    **dict.fromkeys(
        (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default), _matmul
    ),
}
