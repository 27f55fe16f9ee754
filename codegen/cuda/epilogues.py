"""What follows a product, element by element, printed from the graph as a function that it takes.

y = x W^T + b, then any chain of element-wise operators that reads nothing but y, numbers, and one
other value of the same places: `epilogue(value, other) -> value`, in float32, inlined by the compiler.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.codegen.cuda.pointwise import element, is_pointwise, op_name
from dcompile.codegen.cuda.tiles import Text
from dcompile.ir.edit import node_of, value
from dcompile.ir.program import Program
from dcompile.ir.show import SHORT, show_node
from dcompile.ir.sizes import elements, shape_of

RESHAPE = torch.ops.aten.reshape.default
FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Epilogue:
    """A chain of nodes behind a product: the last of them is what the kernel writes."""

    nodes: tuple[Node, ...]
    other: Node | None
    name: str
    body: str  # below the line that names it

    @property
    def result(self) -> Node:
        return self.nodes[-1]


def find_epilogue(program: Program, product: Node, taken: Set[Node]) -> Epilogue | None:
    """The longest chain behind `product` that no other kernel has taken."""
    chain: list[Node] = []
    other: Node | None = None
    here = product
    while (reader := only_reader(here)) is not None and reader not in taken:
        found = _other(program, reader, here, other)
        if found is None:
            break
        (other,) = found
        chain.append(reader)
        here = reader
    if not chain:
        return None
    lines, before = [], product
    for i, node in enumerate(chain):
        name = f"v{i - 1}" if i else "value"

        def read(x: Node, before: Node = before, name: str = name) -> Text:
            return Text(name if _base(x) is before else "other", "float")

        lines.append(f"    # {show_node(node, program)}")
        lines.append(f"    v{i} = {element(node, read).to('float').text}")
        before = node
    lines.append(f"    return v{len(chain) - 1}")
    words = [op_name(n).strip("_") or "silu_mul" for n in chain]
    return Epilogue(tuple(chain), other, "_".join(words[:4]), "\n".join(lines) + "\n")


def _base(node: Node) -> Node:
    while node.target is RESHAPE:
        node = node_of(node.args[0])
    return node


def only_reader(node: Node) -> Node | None:
    """The one operator that reads a value, seen through reshapes."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is not RESHAPE:
            return user if user.op == "call_function" else None
        node = user
    return None


def _other(
    program: Program, node: Node, here: Node, other: Node | None
) -> tuple[Node | None] | None:
    """The second value of the chain with this node in it; None where it cannot be a part."""
    if not is_pointwise(node) or op_name(node) in ("expand", "where", "masked_fill"):
        return None
    if any(SHORT[value(n).dtype] not in FLOATS for n in (node, *node.all_input_nodes)):
        return None
    shape = shape_of(value(node), program.symbols)
    if elements(shape) != elements(shape_of(value(here), program.symbols)):
        return None
    for argument in node.all_input_nodes:
        if _base(argument) is here:
            continue
        if shape_of(value(argument), program.symbols) != shape or other not in (None, argument):
            return None
        other = argument
    return (other,)
