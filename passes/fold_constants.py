"""What is the same every iteration is computed once: rotary tables, position ids, constants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.errors import OptionError, UnsupportedModel
from dcompile.ir.edit import add_constant, add_weight, bypass, insert, value
from dcompile.ir.evaluate import evaluate, fixed_nodes, probe_lengths
from dcompile.ir.meta import facts
from dcompile.ir.program import Exactness, Program
from dcompile.ir.show import show_node
from dcompile.ir.sizes import is_static

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldConstants:
    """Replace values that depend on constants and positions only by tables read at `row_pos`.

    A value with the sequence along one axis becomes a table over all compiled positions and a gather
    of the rows' positions.  Values with two such axes (attention masks) are left to reuse_kv.
    """

    exactness = Exactness.EXACT

    def __call__(self, program: Program) -> int:
        fixed = fixed_nodes(program)
        sites = [n for n in program.nodes() if n in fixed and _is_frontier(n, fixed)]
        folded: dict[object, Node] = {}
        for node in sites:
            _fold(program, node, fixed, folded)
        return len(sites) + _cast_weights(program)


def _cast_weights(program: Program) -> int:
    """A weight that is only read in another dtype is stored in it."""
    sites = [n for n in program.calls(aten._to_copy.default) if _is_weight(program, n.args[0])]
    for node in sites:
        weight = node.args[0]
        assert isinstance(weight, Node)
        short = str(value(node).dtype).removeprefix("torch.")
        name = f"{weight.name}_{short}"
        recipe = program.recipes[weight.name]
        bypass(program, node, add_weight(program, name, recipe, value(node)))
    return len(sites)


def _is_weight(program: Program, node: object) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and program.input(node.name).kind == "weight"
    )


def moving_axes(x: torch.Tensor) -> list[int]:
    return [i for i, d in enumerate(x.shape) if not is_static(d)]


def _is_frontier(node: Node, fixed: set[Node]) -> bool:
    if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor):
        return False
    if len(moving_axes(value(node))) > 1:
        return False
    return any(user not in fixed for user in node.users)


def _check_lengths(program: Program, node: Node, whole: torch.Tensor, axes: list[int]) -> None:
    """Raise UnsupportedModel where a value of a shorter sequence is no beginning of the longest one's.

    Tables are made once, at the compiled maximum length.
    """
    for length in probe_lengths(node, program):
        part = evaluate(node, program, length)
        begin = whole.narrow(axes[0], 0, part.shape[axes[0]]) if axes else whole
        if part.shape != begin.shape or not _same(part, begin):
            raise UnsupportedModel(
                f"a value depends on the length of the sequence: at {length} positions it is not "
                f"what it is at {program.shape.positions}",
                where=f"{facts(node).origin or 'the model'}: {show_node(node, program)}",
                remedy="compute it from each position alone (torch.arange), not from their number",
            )


def _same(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Equal, but for the last digits: libraries round the ends of long vectors in another way."""
    if not part.is_floating_point():
        return torch.equal(part, whole)
    a, b = part.double(), whole.double()
    finite = b[b.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    digits = torch.finfo(part.dtype).eps
    return torch.allclose(a, b, rtol=8 * digits, atol=8 * digits * largest, equal_nan=True)


def _fold(program: Program, node: Node, fixed: set[Node], folded: dict[object, Node]) -> None:
    tensor = evaluate(node, program, program.shape.positions).contiguous()
    readers = [u for u in node.users if u not in fixed]
    axes = moving_axes(value(node))
    _check_table(program, node, tensor, axes)
    _check_lengths(program, node, tensor, axes)
    # Equal values are one constant and one gather, so that later passes see that they are the same.
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    key = (tensor.dtype, tensor.shape, tuple(axes), raw)
    if key not in folded:
        folded[key] = _constant(program, node, tensor, axes)
    for reader in readers:
        reader.replace_input_with(node, folded[key])


def _constant(program: Program, node: Node, tensor: torch.Tensor, axes: list[int]) -> Node:
    """The value as a constant, or as a table read at the rows' positions."""
    name = "const_" + node.name
    if not axes:
        return add_constant(program, name, tensor)
    (axis,) = axes
    table = tensor.movedim(axis, 0).contiguous()
    held = add_constant(program, name, table)
    new = insert(program, node, aten.index.Tensor, held, [program.placeholder("row_pos")])
    if axis == 0:
        return new
    order = list(range(1, table.dim()))
    order.insert(axis, 0)
    return insert(program, node, aten.permute.default, new, order)


def _check_table(program: Program, node: Node, tensor: torch.Tensor, axes: list[int]) -> None:
    positions = program.shape.positions
    if axes and tensor.shape[axes[0]] != positions:
        held = tensor.shape[axes[0]]
        raise OptionError(
            f"the model has {held} positions, fewer than the maximum length {positions}",
            where=facts(node).origin or node.name,
            remedy=f"--max-length {held}",
        )
