"""Operators that a printed kernel computes from simpler ones: softmax, layer norm, argmax.

In float32 whatever their dtype, and rounded once at the end, as torch computes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from dcompile.ir.edit import add_constant, insert, node_of, value, whole
from dcompile.ir.program import Program

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)


def decompose(program: Program) -> None:
    """Rewrite the operators of `TABLE` in place."""
    for node in program.calls(*TABLE):
        new = TABLE[node.target](_At(program, node))
        if new is None:
            continue
        if value(new).dtype != value(node).dtype:
            new = insert(program, node, aten._to_copy.default, new, like=node)
            new.kwargs = {"dtype": value(node).dtype}
            new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)


class _At:
    """Inserts before a node."""

    def __init__(self, program: Program, node: Node) -> None:
        self.program, self.node = program, node

    def __call__(self, target: Callable[..., object], *args: object) -> Node:
        return insert(self.program, self.node, target, *args)

    def wide(self, x: object) -> Node:
        """The value in float32."""
        x = node_of(x)
        if value(x).dtype not in HALVES:
            return x
        with self.program.graph.inserting_before(self.node):
            new = self.program.graph.call_function(
                aten._to_copy.default, (x,), {"dtype": torch.float32}
            )
        new.meta = dict(x.meta)
        new.meta["val"] = value(x).to(torch.float32)
        return new


def _axis(x: object, dim: object) -> int:
    return whole(dim) % value(x).dim()


def _last_axes(x: object, shape: object) -> list[int]:
    """The axes that a norm over `shape` runs along."""
    assert isinstance(shape, (list, tuple))
    rank = value(x).dim()
    return list(range(rank - len(shape), rank))


def _softmax(at: _At) -> Node | None:
    x, dim = at.node.args[:2]
    if not value(x).dtype.is_floating_point:
        return None
    x = at.wide(x)
    axis = _axis(x, dim)
    # A row of nothing but minus infinity gives NaN, as in torch.
    below = at(aten.sub.Tensor, x, at(aten.amax.default, x, [axis], True))
    raised = at(aten.exp.default, below)
    total = at(aten.sum.dim_IntList, raised, [axis], True)
    if at.node.target in (aten.log_softmax.int, aten._log_softmax.default):
        return at(aten.sub.Tensor, below, at(aten.log.default, total))
    return at(aten.div.Tensor, raised, total)


def _layer_norm(at: _At) -> Node | None:
    x, shape, weight, bias, eps = (*at.node.args, None, None, 1e-5)[:5]
    axes = _last_axes(x, shape)
    x = at.wide(x)
    centred = at(aten.sub.Tensor, x, at(aten.mean.dim, x, axes, True))
    variance = at(aten.mean.dim, at(aten.mul.Tensor, centred, centred), axes, True)
    out = at(aten.mul.Tensor, centred, at(aten.rsqrt.default, at(aten.add.Tensor, variance, eps)))
    if weight is not None:
        out = at(aten.mul.Tensor, out, at.wide(weight))
    return out if bias is None else at(aten.add.Tensor, out, at.wide(bias))


def _rms_norm(at: _At) -> Node | None:
    """The norms that the family leaves: over several axes, or of mixed dtypes."""
    x, shape, weight, eps = (*at.node.args, None, None)[:4]
    axes, simple = _last_axes(x, shape), value(x).dtype == value(at.node).dtype
    if len(axes) == 1 and eps is not None and simple:
        return None
    eps = torch.finfo(value(x).dtype).eps if eps is None else eps
    x = at.wide(x)
    mean = at(aten.mean.dim, at(aten.mul.Tensor, x, x), axes, True)
    out = at(aten.mul.Tensor, x, at(aten.rsqrt.default, at(aten.add.Tensor, mean, eps)))
    return out if weight is None else at(aten.mul.Tensor, out, at.wide(weight))


def _argmax(at: _At) -> Node | None:
    """The first place of the greatest (least); NaN is taken for neither."""
    x, dim = (*at.node.args, None)[:2]
    if dim is None or not isinstance(value(x).shape[_axis(x, dim)], int):
        return None
    keep = bool(at.node.args[2]) if len(at.node.args) > 2 else at.node.kwargs.get("keepdim", False)
    axis = _axis(x, dim)
    size = int(value(x).shape[axis])
    best = aten.amax.default if at.node.target is aten.argmax.default else aten.amin.default
    first = at(aten.eq.Tensor, x, at(best, x, [axis], True))
    shape = [size if d == axis else 1 for d in range(value(x).dim())]
    places = add_constant(at.program, "const_places", torch.arange(size).reshape(shape))
    return at(aten.amin.default, at(aten.where.ScalarOther, first, places, size), [axis], keep)


TABLE: dict[object, Callable[[_At], Node | None]] = {
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.log_softmax.int: _softmax,
    aten._log_softmax.default: _softmax,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.argmax.default: _argmax,
    aten.argmin.default: _argmax,
}
