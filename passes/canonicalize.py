"""One spelling for each thing: views as reshape or permute, parts as slice, nothing without effect."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir.edit import bypass, insert, replace, value
from dcompile.ir.program import Exactness, Program
from dcompile.ir.sizes import expression, is_static

aten = torch.ops.aten

ASSERTS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# In a functional graph these only say something about memory.
COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.native_dropout.default,
}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.view_as.default,
}
PERMUTES = {aten.transpose.int, aten.t.default, aten.permute.default, aten.movedim.int}
CASTS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.type_as.default,
    aten.to.device,
}
SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
}


@dataclass(frozen=True)
class Canonicalize:
    """Drop export's assertions and everything that changes no value; spell views one way.

    Afterwards a change of shape is `reshape` (at most one axis is -1), a change of order `permute`, a
    part `slice`, a change of dtype `_to_copy`, and none of them stands directly on its own kind.
    """

    exactness = Exactness.EXACT

    def __call__(self, program: Program) -> int:
        changed = 0
        for rule in (_drop_asserts, _split_to_slices):
            changed += rule(program)
        while True:
            now = sum(_simplify(program, node) for node in program.nodes())
            now += _drop_dead(program)
            if not now:
                return changed
            changed += now


def _drop_dead(program: Program) -> int:
    before = len(program.graph.nodes)
    for node in reversed(program.nodes()):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
    return before - len(program.graph.nodes)


def _drop_asserts(program: Program) -> int:
    sites = list(program.calls(*ASSERTS))
    for node in sites:
        program.graph.erase_node(node)
    return len(sites)


def _split_to_slices(program: Program) -> int:
    """split(x)[i] -> slice(x) (select for unbind)"""
    sites = [n for n in program.calls(operator.getitem) if _target(n.args[0]) in SPLITS]
    for item in sites:
        split, index = item.args
        assert isinstance(split, Node) and isinstance(index, int)
        x = split.args[0]
        parts = split.meta["val"]
        if split.target is aten.unbind.int:
            dim = _last(split, 1, 0) % value(x).dim()
            replace(program, item, aten.select.int, x, dim, index)
            continue
        dim = _last(split, 2, 0) % value(x).dim()
        start = sum(p.shape[dim] for p in parts[:index])
        replace(program, item, aten.slice.Tensor, x, dim, start, start + parts[index].shape[dim])
    return len(sites)


def _target(arg: object) -> object:
    return arg.target if isinstance(arg, Node) else None


def _last(node: Node, index: int, default: int) -> int:
    found = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    assert isinstance(found, int)
    return found


def _simplify(program: Program, node: Node) -> int:
    """Rewrite one node if it can be spelled more simply; 1 if it was."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    rule = RULES.get(node.target)
    return rule(program, node) if rule is not None else 0


def _copy(program: Program, node: Node) -> int:
    (x, *_) = node.args
    assert isinstance(x, Node)
    bypass(program, node, x)
    return 1


def _cast(program: Program, node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    if value(x).dtype == value(node).dtype:
        bypass(program, node, x)
        return 1
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        return 0
    with program.graph.inserting_before(node):
        cast = program.graph.call_function(
            aten._to_copy.default, (x,), {"dtype": value(node).dtype}
        )
    cast.meta = dict(node.meta)
    bypass(program, node, cast)
    return 1


def same_shape(a: torch.Size, b: torch.Size) -> bool:
    """Equal sizes, symbols compared by their expressions."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(expression(a) == expression(b))


def shape_arg(shape: torch.Size) -> list[int] | None:
    """A shape as an argument of reshape: its symbolic axis as -1; None where there are two."""
    moving = [i for i, d in enumerate(shape) if not is_static(d)]
    if len(moving) > 1:
        return None
    return [-1 if i in moving else int(d) for i, d in enumerate(shape)]


def _reshape(program: Program, node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    if same_shape(value(x).shape, value(node).shape):
        bypass(program, node, x)
        return 1
    source = x
    while isinstance(source, Node) and source.target is aten.reshape.default:
        source = source.args[0]  # type: ignore[assignment]
    wanted = shape_arg(value(node).shape)
    if wanted is None or (
        node.target is aten.reshape.default and source is x and node.args[1] == wanted
    ):
        return 0
    replace(program, node, aten.reshape.default, source, wanted)
    return 1


def _permute(program: Program, node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    order = _order(node)
    if x.target is aten.permute.default:
        inner = _order(x)
        order = [inner[i] for i in order]
        x = x.args[0]  # type: ignore[assignment]
    elif node.target is aten.permute.default and order == list(node.args[1]):  # type: ignore[arg-type]
        return _settle_permute(program, node, x, order)
    if order == sorted(order):
        bypass(program, node, x)
    else:
        replace(program, node, aten.permute.default, x, order)
    return 1


def _settle_permute(program: Program, node: Node, x: Node, order: list[int]) -> int:
    """A permute that only moves axes of size 1 is a reshape."""
    if order == sorted(order):
        bypass(program, node, x)
        return 1
    shape = value(x).shape
    moved = [i for i in order if not (is_static(shape[i]) and int(shape[i]) == 1)]
    wanted = shape_arg(value(node).shape)
    if moved == sorted(moved) and wanted is not None:
        replace(program, node, aten.reshape.default, x, wanted)
        return 1
    return 0


def _order(node: Node) -> list[int]:
    dims = value(node.args[0]).dim()  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        return [d % dims for d in node.args[1]]  # type: ignore[union-attr]
    order = list(range(dims))
    if node.target is aten.t.default:
        return order[::-1]
    a, b = (d % dims for d in node.args[1:3])  # type: ignore[operator]
    if node.target is aten.movedim.int:
        order.insert(b, order.pop(a))
        return order
    order[a], order[b] = order[b], order[a]
    return order


def _slice(program: Program, node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    if same_shape(value(x).shape, value(node).shape):
        bypass(program, node, x)
        return 1
    dim = (node.args[1] if len(node.args) > 1 else 0) % value(x).dim()  # type: ignore[operator]
    size = value(x).shape[dim]
    step = node.args[4] if len(node.args) > 4 else 1
    start, end = (*node.args[2:4], None, None)[:2]
    if step != 1 or not is_static(size) or isinstance(start, Node) or isinstance(end, Node):
        return 0
    bounds = range(int(size))[slice(start, end)]
    wanted = (x, dim, bounds.start, bounds.stop)
    if tuple(node.args) == wanted:
        return 0
    replace(program, node, aten.slice.Tensor, *wanted)
    return 1


def _select(program: Program, node: Node) -> int:
    """select(x, dim, i) -> reshape(slice(x, dim, i, i + 1)), without the slice where the axis is 1"""
    x, dim, index = node.args
    assert isinstance(x, Node) and isinstance(dim, int) and isinstance(index, int)
    dim %= value(x).dim()
    size = value(x).shape[dim]
    wanted = shape_arg(value(node).shape)
    if not is_static(size) or wanted is None:
        return 0
    if int(size) != 1:
        index %= int(size)
        x = insert(program, node, aten.slice.Tensor, x, dim, index, index + 1)
    replace(program, node, aten.reshape.default, x, wanted)
    return 1


def _expand(program: Program, node: Node) -> int:
    x = node.args[0]
    assert isinstance(x, Node)
    if same_shape(value(x).shape, value(node).shape):
        bypass(program, node, x)
        return 1
    return 0


def _matmul(program: Program, node: Node) -> int:
    """x @ permute(w) with w [N, K] an input -> linear(x, w)"""
    x, w = node.args[:2]
    if not (isinstance(w, Node) and w.target is aten.permute.default and isinstance(x, Node)):
        return 0
    weight = w.args[0]
    assert isinstance(weight, Node)
    if weight.op != "placeholder" or value(weight).dim() != 2:
        return 0
    replace(program, node, aten.linear.default, x, weight)
    return 1


Rule = Callable[[Program, Node], int]
RULES: dict[object, Rule] = {
    **dict.fromkeys(COPIES, _copy),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(PERMUTES, _permute),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.expand.default: _expand,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
}
