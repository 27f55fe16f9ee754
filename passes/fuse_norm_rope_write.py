"""q/k norm, rotary embedding, K/V rows written  ->  norm_rope_write(qkv)

Input: the queries' lines, which the keys have too, and the last two of the keys, which values have too:

    slice_tensor_4: f32[1, R, 64] = slice.Tensor(linear_default, 2, 0, 64)
    reshape_default_3: f32[1, R, 4, 16] = reshape.default(slice_tensor_4, [1, -1, 4, 16])
    rms_norm_1: f32[1, R, 4, 16] = rms_norm.default(reshape_default_3, [16], q_norm_weight, 1e-05)
    slice_tensor: f32[1, R, 4, 8] = slice.Tensor(rms_norm_1, 3, 8, 16)
    neg: f32[1, R, 4, 8] = neg.default(slice_tensor)
    slice_4: f32[1, R, 4, 8] = slice.Tensor(rms_norm_1, 3, 0, 8)
    cat_1: f32[1, R, 4, 16] = cat.default([neg, slice_4], -1)
    mul_62: f32[1, R, 4, 16] = mul.Tensor(rms_norm_1, index_tensor)
    mul_66: f32[1, R, 4, 16] = mul.Tensor(cat_1, index_tensor_1)
    add_91: f32[1, R, 4, 16] = add.Tensor(mul_62, mul_66)
    reshape_default_25: f32[R, 2, 16] = reshape.default(add_120, [-1, 2, 16])
    write_rows_default: f32[2, 64, 2, 16] = dcompile.write_rows(keys_0, reshape_default_25, row_seq, row_pos)

Output, whose results are the queries and both caches:

    reshape_default_37: f32[R, 128] = reshape.default(linear_default, [-1, 128])
    norm_rope_write_default: (f32[R, 4, 16], f32[2, 64, 2, 16], f32[2, 64, 2, 16]) =
        dcompile.norm_rope_write(reshape_default_37, q_norm_weight, k_norm_weight, const_cos_rows, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.edit import add_constant, axes, bypass, insert, item, node_of, through, value
from dcompile.ir.meta import facts, note
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark
from dcompile.ir.sizes import evaluate, shape_of

aten = torch.ops.aten
VIEW, CAST, SLICE = aten.reshape.default, aten._to_copy.default, aten.slice.Tensor


@dataclass(frozen=True)
class FuseNormRopeWrite:
    """Everything between the merged projection and attention in one kernel, rows written in place."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        tables: dict[Node, Node] = {}
        return sum(_fuse(program, node, tables) for node in list(program.calls(operators.ATTEND)))


@dataclass(frozen=True)
class Head:
    """How queries or keys are made: a part of a product, normed, rotated by two tables."""

    source: Node
    start: int
    norm: Node | None
    eps: float
    cos: Node | None
    sin: Node | None


def _fuse(program: Program, node: Node, tables: dict[Node, Node]) -> int:
    q, keys, values = node.args[:3]
    assert isinstance(q, Node) and isinstance(keys, Node) and isinstance(values, Node)
    if keys.target is not operators.WRITE_ROWS:
        return 0
    k, v = keys.args[1], values.args[1]
    qh, kh = _head(program, q), _head(program, k)
    part = _slice_of(through(v, VIEW))
    if qh is None or kh is None or part is None:
        return _leave(program, node, "queries or keys are not norm + rotary embedding of a product")
    heads, size = (int(d) for d in value(q).shape[1:])
    groups = int(value(keys).shape[2])
    places = (qh.start, kh.start, part[1])
    if (qh.source, kh.source) != (part[0], part[0]) or places != (
        0,
        heads * size,
        (heads + groups) * size,
    ):
        return _leave(program, node, "queries, keys and values are not parts of one product")
    if (qh.cos, qh.sin) != (kh.cos, kh.sin) or qh.eps != kh.eps:
        return _leave(program, node, "queries and keys are rotated or normed differently")
    cos, sin = (_table(program, t, tables) for t in (qh.cos, qh.sin))
    if cos is None or sin is None:
        return _leave(program, node, "the rotary tables do not depend on the position alone")
    rows = insert(program, node, VIEW, qh.source, [-1, (heads + 2 * groups) * size])
    fused = insert(
        program,
        node,
        operators.NORM_ROPE_WRITE,
        *(rows, qh.norm, kh.norm, cos, sin, keys.args[2], keys.args[3]),
        *(keys.args[0], values.args[0], heads, qh.eps),
    )
    note(fused, role="norm_rope_write")
    news = [item(program, node, fused, i) for i in range(3)]
    node.replace_input_with(q, news[0])
    for old, new in zip((keys, values), news[1:], strict=True):
        bypass(program, old, new)
    return 1


def _leave(program: Program, node: Node, why: str) -> int:
    program.remarks.append(Remark("fuse_norm_rope_write", facts(node).origin or node.name, why))
    return 0


def _slice_of(node: Node | None) -> tuple[Node, int] | None:
    # With a step there is one argument more.
    if node is None or node.target is not SLICE or len(node.args) != 4:
        return None
    x, dim, start, _ = node.args
    assert isinstance(x, Node) and isinstance(start, int)
    last = dim == value(x).dim() - 1
    if last:
        return x, start
    # A slice of heads, [.., H, K], starts at a multiple of the head size.
    if dim == value(x).dim() - 2 and (whole := through(x, VIEW)) is not None:
        return whole, start * int(value(x).shape[-1])
    return None


def _head(program: Program, node: object) -> Head | None:
    """Match  [cast] (x cos + rotate_half(x) sin) [cast] [++ rest of x]  of  [norm]  of a slice."""
    size = int(value(node).shape[-1])
    turning, turned = _moved(node)
    rotated = None if turning is None else _rotated(turning)
    if rotated is None:
        return None
    straight, cos, sin = rotated
    x, normed = _moved(straight)
    moves = [normed, turned]
    norm, eps = None, 0.0
    if x is not None and x.target is aten.rms_norm.default:
        shape, weight, eps = x.args[1], *x.args[2:4]  # type: ignore[assignment]
        norm = weight if isinstance(weight, Node) else None
        # A norm over all heads together, as in OLMo 2, is another.
        if shape != [size] or norm is None or eps is None:
            return None
        x, sliced = _moved(x.args[0])
        moves.insert(0, sliced)
    part = _slice_of(x)
    if part is None or not _keeps_heads(program, x, moves, size):
        return None
    return Head(*part, norm, float(eps), cos, sin)


def _moved(node: object) -> tuple[Node | None, list[Node]]:
    """What stands behind views and permutations, and these, innermost first."""
    between: list[Node] = []
    while isinstance(node, Node) and node.target in (VIEW, aten.permute.default):
        between.insert(0, node)
        node = node.args[0]
    return (node if isinstance(node, Node) else None), between


def _keeps_heads(program: Program, x: Node | None, moves: list[list[Node]], size: int) -> bool:
    """Whether views and permutations only cut rows into heads: tried out on numbers, with 7 rows."""

    def shape(node: Node) -> list[int]:
        sizes = shape_of(value(node), program.symbols)
        return [evaluate(each, {"R": 7, "B": 3}) for each in sizes]

    assert x is not None
    start = torch.arange(prod(shape(x))).reshape(shape(x))
    at, inside = start, torch.arange(size)
    for between in moves:
        for node in between:
            moved = node.target is aten.permute.default
            at = at.permute(axes(node.args[1], at.dim())) if moved else at.reshape(shape(node))
        # Norm and rotation run along the last axis, which must be a head from its start.
        if at.shape[-1] != size or not bool((at % size == inside).all()):
            return False
    return torch.equal(at.reshape(7, -1), start.reshape(7, -1))


def _rotated(node: Node) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) where node rotates the first part of x, or all of it."""
    if (joined := _pair(node)) is not None:
        front, rest = joined
        found = _turned(through(front, CAST))
        if found is None or rest.target is not SLICE:
            return None
        x, head = node_of(rest.args[0]), through(found[0], CAST)
        last, size = value(x).dim() - 1, int(value(x).shape[-1])
        rotated = int(value(front).shape[-1])
        whole = (
            head is not None
            and head.target is SLICE
            and head.args == (x, last, 0, rotated)
            and rest.args == (x, last, rotated, size)
        )
        return (x, *found[1:]) if whole else None
    found = _turned(through(node, CAST))
    if found is None:
        return None
    turned = through(found[0], CAST)
    return None if turned is None else (turned, *found[1:])


def _turned(node: Node | None) -> tuple[Node, Node, Node] | None:
    """x * cos + cat(-x[half:], x[:half]) * sin"""
    if node is None or node.target is not aten.add.Tensor:
        return None
    products = [a for a in node.args if isinstance(a, Node) and a.target is aten.mul.Tensor]
    if len(products) != 2:
        return None
    for straight, crossed in (products, products[::-1]):
        for x, cos in (straight.args, straight.args[::-1]):
            for half, sin in (crossed.args, crossed.args[::-1]):
                if _is_half_turn(half, x):
                    return x, cos, sin  # type: ignore[return-value]
    return None


def _is_half_turn(node: object, x: object) -> bool:
    parts = _pair(node)
    if parts is None or parts[0].target is not aten.neg.default or not isinstance(x, Node):
        return False
    size, last = int(value(x).shape[-1]), value(x).dim() - 1
    back, front = node_of(parts[0].args[0]), parts[1]
    return (
        back.target is front.target is SLICE
        and back.args == (x, last, size // 2, size)
        and front.args == (x, last, 0, size // 2)
    )


def _pair(node: object) -> tuple[Node, Node] | None:
    """The two values that node joins; None where it joins no two."""
    if not isinstance(node, Node) or node.target is not aten.cat.default:
        return None
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    return node_of(parts[0]), node_of(parts[1])


def _table(program: Program, node: Node | None, tables: dict[Node, Node]) -> Node | None:
    """The constant [L, rot] in float32 behind a value gathered by row_pos."""
    found = through(node, VIEW, aten.permute.default)
    if found is None or found.target is not aten.index.Tensor:
        return None
    held, indices = found.args
    if not isinstance(held, Node) or program.input(held.name).kind != "constant":
        return None
    if [getattr(i, "name", None) for i in indices] != ["row_pos"]:  # type: ignore[union-attr]
        return None
    if held not in tables:
        table = program.constants[held.name]
        if table[0].numel() != table.shape[-1]:
            return None
        flat = table.reshape(table.shape[0], table.shape[-1]).float().contiguous()
        tables[held] = add_constant(program, f"{held.name}_rows", flat)
    return tables[held]
