"""Read one element of a node's value as a formula, following operators backwards.

Views, parts and lookups only move indices; products of tensors become sums over an index; what is not
known here, and what the router reads, stays a reference to the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.sizes import is_static, size_of
from dcompile.passes.moe.algebra import Expr, NotProven, Num, Ref
from dcompile.passes.moe.terms import (
    ROWS,
    ZERO,
    Chosen,
    Const,
    Size,
    Term,
    Var,
    quotient,
    reindex,
    remainder,
    shift,
)

aten = torch.ops.aten
BUDGET = 200_000  # elements read for one router
Index = tuple[Term, ...]
Handler = Callable[["Reader", Node, Index], Expr | None]


@dataclass
class Reader:
    """Formulas of elements; `leaves` are never looked into."""

    program: Program
    leaves: Collection[Node]
    opaque: frozenset[object] = frozenset()  # targets that are not looked into either
    handlers: dict[object, Handler] = field(default_factory=dict)
    count: int = 0
    spent: int = 0
    known: dict[tuple[Node, Index], Expr] = field(default_factory=dict)

    def fresh(self, size: int) -> Var:
        self.count += 1
        return Var(self.count, size)

    def sizes(self, node: Node) -> list[Size]:
        """The shape as the algebra of indices wants it; NotProven where it is another."""
        out: list[Size] = []
        for dim in value(node).shape:
            size = int(dim) if is_static(dim) else size_of(dim, self.program.symbols)
            if isinstance(size, int):
                out.append((False, size))
            elif list(size) == ["R"]:
                out.append((True, size["R"]))
            else:
                raise NotProven(f"{node.name} has a size that is no multiple of the rows")
        return out

    def along(self, size: int) -> Var | Const:
        """An index of an axis of that size: a new variable, or the only one there is."""
        return self.fresh(size) if size > 1 else ZERO

    def axis(self, node: Node, dim: int) -> Var:
        """A new variable that runs over an axis."""
        moving, factor = self.sizes(node)[dim]
        return self.fresh(ROWS if moving else factor)

    def whole(self, node: Node) -> Index:
        """New variables for all axes of a value, 0 where the axis has size 1."""
        sizes = self.sizes(node)
        return tuple(ZERO if s == (False, 1) else self.fresh(ROWS if s[0] else s[1]) for s in sizes)

    def element(self, node: Node, index: Index) -> Expr:
        """The formula of node[index]."""
        node, index = self.locate(node, index)
        key = (node, index)
        if key not in self.known:
            self.spent += 1
            if self.spent > BUDGET:
                raise NotProven("its formula is too large")
            self.known[key] = self._read(node, index)
        return self.known[key]

    def _read(self, node: Node, index: Index) -> Expr:
        if node.op == "call_function" and node not in self.leaves:
            handler = self.handlers.get(node.target)
            if handler is not None and node.target not in self.opaque:
                found = handler(self, node, index)
                if found is not None:
                    return found
        if node.op == "placeholder" and node.name in self.program.constants:
            held = self.program.constants[node.name]
            if held.numel() == 1:
                return Num(float(held))
        return Ref(node, index)

    def operand(self, node: Node, arg: object, index: Index) -> Expr:
        """Element of an operand that is broadcast to `node`'s shape, or of a plain number."""
        if isinstance(arg, (int, float)):
            return Num(float(arg))
        if not isinstance(arg, Node) or not isinstance(arg.meta.get("val"), torch.Tensor):
            raise NotProven(f"{node.name} has an operand that is no tensor")
        return self.element(arg, self.broadcast(arg, index))

    def broadcast(self, arg: Node, index: Index) -> Index:
        sizes = self.sizes(arg)
        tail = index[len(index) - len(sizes) :]
        return tuple(ZERO if s == (False, 1) else t for s, t in zip(sizes, tail, strict=True))

    # Where an element lies.

    def locate(self, node: Node, index: Index) -> tuple[Node, Index]:
        """The node and place that the element is copied from."""
        while node.op == "call_function" and node.target in MOVES:
            found = MOVES[node.target](self, node, index)
            if found is None:
                break
            node, index = found
        return node, index

    def term(self, arg: object, index: Index) -> Term | None:
        """An integer element as an index, where it is one that we know."""
        if isinstance(arg, int):
            return Const(arg)
        if not isinstance(arg, Node):
            return None
        node, index = self.locate(arg, index)
        if node.op == "placeholder" and node.name in self.program.constants:
            held = self.program.constants[node.name]
            if held.numel() == 1 and not held.is_floating_point():
                return Const(int(held))
            if held.dim() == 1 and torch.equal(held, torch.arange(len(held))):
                return index[0]
        if node.target is operator.getitem and node.args[1] == 1 and is_choice(node.args[0]):
            (topk, _), last = node.args, node.meta["val"].dim() - 1
            size = int(value(topk.args[0]).shape[last])  # type: ignore[union-attr]
            return Chosen(topk, index, size)  # type: ignore[arg-type]
        if node.target in (aten.arange.default, aten.arange.start) and len(node.args) <= 2:
            start = node.args[0] if node.target is aten.arange.start else 0
            return shift(index[0], start) if isinstance(start, int) else None
        if node.target is aten.add.Tensor and isinstance(node.args[1], int):
            inner = self.term(node.args[0], index)
            return None if inner is None else shift(inner, node.args[1])
        return None


def is_choice(node: object) -> bool:
    """topk along the last axis, or a whole sort of it, greatest first: its indices are distinct."""
    if not isinstance(node, Node) or node.target not in (aten.topk.default, aten.sort.default):
        return False
    topk = node.target is aten.topk.default
    given = node.args[2:4] if topk else node.args[1:3]
    dim = given[0] if given else node.kwargs.get("dim", -1)
    descending = node.kwargs.get("largest" if topk else "descending", topk)
    descending = given[1] if len(given) > 1 else descending
    rank = value(node.args[0]).dim()
    return dim in (-1, rank - 1) and bool(descending)


def _reshape(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x = node.args[0]
    assert isinstance(x, Node)
    found = reindex(reader.sizes(node), reader.sizes(x), index)
    return None if found is None else (x, tuple(found))


def _permute(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x, order = node.args
    assert isinstance(x, Node) and isinstance(order, (list, tuple))
    back: list[Term] = [ZERO] * len(index)
    for term, axis in zip(index, order, strict=True):
        back[int(axis)] = term
    return x, tuple(back)


def _same(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x = node.args[0]
    assert isinstance(x, Node)
    was, now = value(x).dtype, value(node).dtype
    # A cast to an integer rounds; between floats it only does so to the last places.
    kept = not was.is_floating_point and now != torch.bool
    return (x, index) if now.is_floating_point or kept else None


def _slice(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x, dim, start, *rest = node.args
    if not isinstance(x, Node) or not isinstance(start, int) or rest[1:] not in ([], [1]):
        return None
    place = list(index)
    place[dim] = shift(place[dim], start)  # type: ignore[index]
    return x, tuple(place)


def _expand(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x = node.args[0]
    assert isinstance(x, Node)
    return x, reader.broadcast(x, index)


def _repeat(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x = node.args[0]
    assert isinstance(x, Node)
    sizes = reader.sizes(x)
    tail = index[len(index) - len(sizes) :]
    if any(s[0] and t != 1 for s, t in zip(sizes, node.args[1][-len(sizes) :], strict=True)):  # type: ignore
        return None
    return x, tuple(t if s[0] else remainder(t, s[1]) for s, t in zip(sizes, tail, strict=True))


def _repeat_interleave(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x, count, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim")
    if not isinstance(x, Node) or not isinstance(count, int) or not isinstance(dim, int):
        return None
    place = list(index)
    place[dim] = quotient(place[dim], count)
    return x, tuple(place)


def _index(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    """x[.., i, ..] by one tensor of indices"""
    x, indices = node.args
    assert isinstance(x, Node) and isinstance(indices, (list, tuple))
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not isinstance(given[0][1], Node):
        return None
    axis, which = given[0]
    rank = value(which).dim()
    found = reader.term(which, index[axis : axis + rank])
    return None if found is None else (x, (*index[:axis], found, *index[axis + rank :]))


def _index_select(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x, axis, which = node.args
    assert isinstance(x, Node) and isinstance(axis, int)
    axis %= len(index)
    found = reader.term(which, (index[axis],))
    return None if found is None else (x, (*index[:axis], found, *index[axis + 1 :]))


def _gather(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    x, axis, which = node.args
    assert isinstance(x, Node) and isinstance(axis, int)
    found = reader.term(which, index)
    if found is None:
        return None
    place = list(index)
    place[axis] = found
    return x, tuple(place)


def _topk_value(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    """topk(x).values[.., j] is x[.., the index that topk put at j]"""
    topk, which = node.args
    if which != 0 or not is_choice(topk):
        return None
    x = topk.args[0]  # type: ignore[union-attr]
    assert isinstance(x, Node) and isinstance(topk, Node)
    return x, (*index[:-1], Chosen(topk, index, int(value(x).shape[-1])))


def _pick(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    """An element of one of the parts of a stack or a concatenation of ones of size 1."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(parts, (list, tuple)) and isinstance(dim, int)
    dim %= len(index)
    at = index[dim]
    if not isinstance(at, Const):
        return None
    if node.target is aten.stack.default:
        return parts[at.value], (*index[:dim], *index[dim + 1 :])  # type: ignore[return-value]
    offset = 0
    for part in parts:
        assert isinstance(part, Node)
        moving, size = reader.sizes(part)[dim]
        if moving:
            return None
        if at.value < offset + size:
            return part, (*index[:dim], Const(at.value - offset), *index[dim + 1 :])
        offset += size
    return None


Move = Callable[[Reader, Node, Index], "tuple[Node, Index] | None"]
MOVES: dict[object, Move] = {
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten._to_copy.default: _same,
    aten.slice.Tensor: _slice,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.stack.default: _pick,
    aten.cat.default: _pick,
    operator.getitem: _topk_value,
}
