"""What is the same every iteration is computed once: rotary tables, position ids, constants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.errors import OptionError
from dcompile.ir.edit import add_constant, add_weight, bypass, insert, value
from dcompile.ir.evaluate import evaluate, fixed_nodes
from dcompile.ir.meta import facts
from dcompile.ir.program import Exactness, Program
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


def _fold(program: Program, node: Node, fixed: set[Node], folded: dict[object, Node]) -> None:
    positions = program.shape.positions
    tensor = evaluate(node, program, positions).contiguous()
    readers = [u for u in node.users if u not in fixed]
    axes = moving_axes(value(node))
    name = "const_" + node.name
    # Equal values are one constant and one gather, so that later passes see that they are the same.
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    key = (tensor.dtype, tensor.shape, tuple(axes), raw)
    if key in folded:
        new = folded[key]
    elif not axes:
        new = add_constant(program, name, tensor)
    else:
        (axis,) = axes
        if tensor.shape[axis] != positions:
            raise OptionError(
                f"the model has {tensor.shape[axis]} positions, fewer than the maximum length "
                f"{positions}",
                where=facts(node).origin or node.name,
                remedy=f"--max-length {tensor.shape[axis]}",
            )
        table = tensor.movedim(axis, 0).contiguous()
        held = add_constant(program, name, table)
        rows = program.placeholder("row_pos")
        new = insert(program, node, aten.index.Tensor, held, [rows])
        if axis != 0:
            order = list(range(1, table.dim()))
            order.insert(axis, 0)
            new = insert(program, node, aten.permute.default, new, order)
    folded[key] = new
    for reader in readers:
        reader.replace_input_with(node, new)
