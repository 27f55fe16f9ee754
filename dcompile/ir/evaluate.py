"""What a value of the graph is, when it depends on nothing but the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node
from torch.utils._pytree import tree_map

from dcompile.ir.program import Program
from dcompile.ir.sizes import evaluate as number
from dcompile.ir.sizes import is_static, size_of

aten = torch.ops.aten
# What may be computed for some of the queries alone: a value for a pair of positions is that pair's.
_SHAPES = {aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_FILLS = {aten.full.default, aten.ones.default, aten.zeros.default, aten.new_ones.default}
_TRIANGLES = {aten.tril.default, aten.triu.default}
# Of these torch does not say that they are.
_POINTWISE = {
    aten.floor_divide.default,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.masked_fill.Scalar,
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
}
_KEEPS = {aten._to_copy.default, aten.clone.default, aten.alias.default, aten.unsqueeze.default}


def fixed_nodes(program: Program) -> set[Node]:
    """Nodes that depend on constants and on the number of rows only: the same every iteration."""
    constants = {i.name for i in program.inputs if i.kind == "constant"}
    sizes = {torch.ops.aten.sym_size.int}
    fixed: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in constants:
                fixed.add(node)
        elif node.op == "call_function" and (
            node.target in sizes or all(a in fixed for a in node.all_input_nodes)
        ):
            fixed.add(node)
    return fixed


def evaluate(node: Node, program: Program, rows: int) -> torch.Tensor:
    """The node's value for a sequence of `rows` positions; the node must be one of `fixed_nodes`."""
    known: dict[Node, object] = {}
    for step in ancestors(node):
        known[step] = _value(step, program, rows, known)
    out = known[node]
    assert isinstance(out, torch.Tensor)
    return out


def ancestors(node: Node) -> list[Node]:
    """The node and all that it is made from, in an order in which they can be computed."""
    order: dict[Node, None] = {}
    pending = [node]
    while pending:
        top = pending[-1]
        # Of what a size is the size does not matter.
        inputs = [] if top.target is aten.sym_size.int else top.all_input_nodes
        missing = [a for a in inputs if a not in order]
        if top in order or not missing:
            order[pending.pop()] = None
        else:
            pending.extend(missing)
    return list(order)


def _value(node: Node, program: Program, rows: int, known: dict[Node, object]) -> object:
    if node.op == "placeholder":
        return program.constants[node.name]
    if node.target is aten.sym_size.int:
        return number(size_of(node.meta["val"], program.symbols), {"R": rows, "B": 1})
    args, kwargs = _known(node.args, known), _known(node.kwargs, known)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _known(arguments: object, known: dict[Node, object]):  # type: ignore[no-untyped-def]
    return tree_map(lambda a: known[a] if isinstance(a, Node) else a, arguments)


def probe_lengths(node: Node, program: Program) -> list[int]:
    """Lengths from 1 to the compiled maximum at which a value that depends on the length is looked at.

    Beside a few of any parity: both sides of every number that the value is computed with, once and
    twice, because that is where a window, a chunk or a table ends.
    """
    most = program.shape.positions
    wanted = {1, 2, 3, 7, 33, most // 3, most // 2 + 1, most - 1, most}
    for number_ in _numbers(node, program):
        wanted |= {n for k in (number_, 2 * number_) for n in (k - 1, k, k + 1)}
    return sorted(n for n in wanted if 1 <= n <= most)


def _numbers(node: Node, program: Program) -> Iterator[int]:
    for step in ancestors(node):
        held = program.constants.get(step.name) if step.op == "placeholder" else None
        for value in (*step.args, *step.kwargs.values()):
            if isinstance(value, (int, float)) and abs(value) < 1 << 40:
                yield abs(int(value))
        if held is not None and not held.is_floating_point() and held.numel() == 1:
            yield abs(int(held))


def evaluate_part(node: Node, program: Program, rows: int, part: slice) -> torch.Tensor | None:
    """Of a value for each pair of positions, the queries in `part`; None where that needs all of it.

    A mask of 32,768 positions has a thousand million pairs, and its arithmetic is in 64 bits.
    """
    known: dict[Node, object] = {}
    for step in ancestors(node):
        if len(_moving(step)) < 2:
            known[step] = _value(step, program, rows, known)
        elif (made := _part(step, program, rows, part, known)) is not None:
            known[step] = made
        else:
            return None
    out = known[node]
    assert isinstance(out, torch.Tensor)
    return out


def _moving(node: Node) -> list[int]:
    """The axes whose size depends on the number of rows."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return []
    return [i for i, d in enumerate(val.shape) if not is_static(d)]


def _part(
    node: Node, program: Program, rows: int, part: slice, known: dict[Node, object]
) -> torch.Tensor | None:
    axes, target = _moving(node), node.target
    val = node.meta["val"]
    if len(axes) != 2 or not isinstance(target, torch._ops.OpOverload):
        return None
    sizes = [number(size_of(d, program.symbols), {"R": rows, "B": 1}) for d in val.shape]
    if [sizes[a] for a in axes] != [rows, rows]:
        return None
    sizes[axes[0]] = part.stop - part.start
    if target in _FILLS:
        value = {aten.ones.default: 1, aten.new_ones.default: 1, aten.zeros.default: 0}
        return torch.full(sizes, value.get(target, node.args[-1]), dtype=val.dtype)  # type: ignore
    operands = [_operand(a, axes[0] - val.dim(), part, known) for a in node.all_input_nodes]
    if any(o is None for o in operands):
        return None
    given = dict(zip(node.all_input_nodes, operands, strict=True))
    if target in _SHAPES:
        x = given[node.all_input_nodes[0]]
        return x.expand(sizes) if target is aten.expand.default else x.reshape(sizes)  # type: ignore
    if target in _TRIANGLES:
        shift = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("diagonal", 0))  # type: ignore
        x = given[node.all_input_nodes[0]]
        return target(x, shift + part.start) if axes[0] == val.dim() - 2 else None
    if target not in _KEEPS | _POINTWISE and torch.Tag.pointwise not in target.tags:
        return None
    return target(*_known(node.args, given), **_known(node.kwargs, given))  # type: ignore


def _operand(node: Node, axis: int, part: slice, known: dict[Node, object]) -> object | None:
    """An operand for the queries in `part`; `axis` is theirs in the result, counted from the end.

    None where the operand's queries lie elsewhere.
    """
    held = known[node]
    moving = _moving(node)
    if not isinstance(held, torch.Tensor) or not moving:
        return held
    if len(moving) == 2:
        return held if moving[0] - held.dim() == axis else None
    at = moving[0] - held.dim()
    return held.narrow(at, part.start, part.stop - part.start) if at == axis else held
