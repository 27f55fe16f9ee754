"""topk and sort in an emitted kernel: each element counts those that come before it.

That is n^2 comparisons for n elements and no exchange: right for routers and blocks, dear for a
vocabulary. Equals keep their order, and NaN is the greatest, as in torch.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Protocol

import torch
from torch.fx import Node

from dcompile.codegen.cuda.tiles import (
    ROW,
    TYPES,
    ZERO,
    Domain,
    Text,
    kind_of,
    linear,
    reshaped,
)
from dcompile.codegen.triton.assemble import power_of_two
from dcompile.ir.edit import node_of, value, whole
from dcompile.ir.program import Program
from dcompile.ir.sizes import Size, shape_of

aten = torch.ops.aten
SORTS = (aten.topk.default, aten.sort.default, aten.sort.stable)


class Printer(Protocol):
    """A kernel that is being printed: its lines so far, and how it reads and stores values."""

    program: Program
    lines: list[str]
    largest: int

    def lead(self, shape: list[Size]) -> int | None: ...

    def load(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text: ...

    def pointer(self, node: Node) -> str: ...

    def stored_text(self, node: Node, text: str) -> str: ...

    def note_stored(self, node: Node) -> None: ...


def can_sort(node: Node) -> bool:
    """Along the last axis, which has one size, of numbers that can be compared."""
    x = value(node.args[0])
    return _axis(node) in (-1, x.dim() - 1) and isinstance(x.shape[-1], int) and x.dtype in TYPES


def _axis(node: Node) -> int:
    at = 2 if node.target is aten.topk.default else 1
    return whole(node.args[at] if len(node.args) > at else node.kwargs.get("dim", -1))


def _largest(node: Node) -> bool:
    at = 3 if node.target is aten.topk.default else 2
    name = "largest" if node.target is aten.topk.default else "descending"
    default = node.target is aten.topk.default
    return bool(node.args[at] if len(node.args) > at else node.kwargs.get(name, default))


def emit_sort(out: Printer, node: Node) -> None:
    """Values and places of the first of an order, stored; `out` is the kernel so far."""
    x = node_of(node.args[0])
    shape = shape_of(value(x), out.program.symbols)
    lead = out.lead(shape)
    n = whole(shape[-1])
    taken = whole(node.args[1]) if node.target is aten.topk.default else n
    rest = [1 if d == lead else whole(s) for d, s in enumerate(shape[:-1])]
    tag = f"s{len(out.lines)}"
    others = prod(rest)
    place = (
        reshaped([Text(f"o{tag}", "index")], [others], [*rest])
        if others > 1
        else [ZERO] * len(rest)
    )
    front = [ROW if d == lead else i for d, i in enumerate(place)]
    columns = power_of_two(n)
    rows_at = Domain((f"i{tag}",), (n,), (min(32, columns),), looped=True)
    beside = Domain((f"j{tag}",), (n,), (min(128, columns),), looped=True)
    out.largest = max(out.largest, rows_at.padded[0] * beside.padded[0])
    before, out.lines = out.lines, []
    mine = out.load(x, [*front, rows_at.axis(0)], rows_at, rows_at.mask)
    other = out.load(x, [*front, beside.axis(0)], beside, beside.mask)
    barriers, out.lines = out.lines, before
    out.lines += barriers[:1]
    indent = ""
    if others > 1:
        out.lines.append(f"for o{tag} in range(0, {others}):")
        indent = "    "
    i, j = rows_at.names[0], beside.names[0]
    a, b = f"a{tag}[:, None]", f"b{tag}[None, :]"
    kind = kind_of(value(x).dtype)
    floats = kind in ("float", "double")
    first, equal = f"{b} {'>' if _largest(node) else '<'} {a}", f"{b} == {a}"
    if floats:
        nan, other_nan = f"({a} != {a})", f"({b} != {b})"
        greatest = f"{other_nan} & ({a} == {a})" if _largest(node) else f"({b} == {b}) & {nan}"
        first, equal = f"({first}) | ({greatest})", f"({equal}) | ({nan} & {other_nan})"
    wide = {"bool": "int32"}.get(kind)
    cast = f".to(tl.{wide})" if wide else ""
    lines = [
        f"for base in range(0, {n}, {rows_at.padded[0]}):",
        f"    {i} = base + tl.arange(0, {rows_at.padded[0]})",
        f"    a{tag} = ({mine.text}){cast}",
        f"    rank{tag} = tl.zeros([{rows_at.padded[0]}], tl.int32)",
        f"    for run in range(0, {n}, {beside.padded[0]}):",
        f"        {j} = run + tl.arange(0, {beside.padded[0]})",
        f"        b{tag} = ({other.text}){cast}",
        f"        ahead = ({first}) | (({equal}) & ({j}[None, :] < {i}[:, None]))",
        f"        ahead = ahead & ({j} < {n})[None, :]",
        f"        rank{tag} += tl.sum(ahead.to(tl.int32), 1)",
        f"    here = ({i} < {n}) & (rank{tag} < {taken})",
    ]
    for user in node.users:
        assert user.target is operator.getitem
        at = linear([*front, Text(f"rank{tag}", "index")], [*shape[:-1], taken])
        made = f"a{tag}" + (" != 0" if wide else "") if user.args[1] == 0 else f"{i}.to(tl.int64)"
        made = out.stored_text(user, made) if user.args[1] == 0 else made
        lines.append(f"    tl.store({out.pointer(user)} + {at.text}, {made}, mask=here)")
        out.note_stored(user)
    out.lines += [indent + line for line in lines]
