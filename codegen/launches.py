"""The launch list: which values a launch reads and writes, before anyone says where they live."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import Node

from dcompile.codegen.triton.variant import Expression, Variant
from dcompile.ir.edit import node_of, value
from dcompile.ir.program import Program
from dcompile.ir.sizes import Size

aten = torch.ops.aten
RESHAPE = aten.reshape.default


@dataclass(frozen=True)
class Value:
    """A node's value as an argument; `offset` in elements, `layout` of a weight."""

    node: Node | None
    offset: int = 0
    layout: Literal["plain", "packed", "experts"] = "plain"


@dataclass(frozen=True)
class Int:
    value: Size


@dataclass(frozen=True)
class Float:
    value: float


@dataclass(frozen=True)
class Scratch:
    """Memory that the launches of one operator hand to each other; a zeroed one all share."""

    name: str
    dtype: str
    size: Size  # elements
    zeroed: bool = False

    def __hash__(self) -> int:
        return hash(self.name)


Argument = Value | Int | Float | Scratch


@dataclass
class Launch:
    """One call of a kernel.  `writes` are new values, `updates` the states that it changes in place.

    A native or CUDA launch's arguments are in the kernel's order; an ATen launch keeps its node.
    """

    kind: Literal["native", "aten", "cuda"]
    kernel: str
    node: Node
    args: list[Argument] = field(default_factory=list)
    writes: list[Node] = field(default_factory=list)
    updates: list[Node] = field(default_factory=list)
    covers: list[Node] = field(default_factory=list)  # the graph nodes that it stands for
    touches: str = ""  # of an emitted function: its arguments in the notation of runtime/cpu/abi.py
    variant: Variant | None = None  # of a CUDA launch
    grid: tuple[Expression, ...] = ()

    def reads(self) -> list[Node]:
        if self.kind == "aten":
            inputs = self.node.all_input_nodes
            return [n for n in inputs if isinstance(n.meta["val"], torch.Tensor)]
        return [a.node for a in self.args if isinstance(a, Value) and a.node is not None]


def base(node: Node) -> Node:
    """What is in memory behind a reshape."""
    while node.target is RESHAPE:
        node = node_of(node.args[0])
    return node


@dataclass
class Schedule:
    """Launches in order, and the source of the functions that were emitted for them."""

    launches: list[Launch] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    touches: dict[str, str] = field(default_factory=dict)  # by emitted function; see Launch
    aliases: dict[Node, Node] = field(default_factory=dict)  # an updated value -> its state


def outputs(node: Node, count: int) -> list[Node | None]:
    """The getitem nodes of a node with several results, None where nobody reads one."""
    found: list[Node | None] = [None] * count
    for user in node.users:
        found[user.args[1]] = user  # type: ignore[index]
    return found


def unread_output(program: Program, node: Node, index: int) -> Node:
    """An output that nobody reads, as a node, so that it has a buffer."""
    with program.graph.inserting_after(node):
        unread = program.graph.call_function(operator.getitem, (node, index))
    unread.meta = {**node.meta, "val": node.meta["val"][index]}
    return unread


def all_outputs(program: Program, node: Node, count: int) -> list[Node]:
    return [
        found if found is not None else unread_output(program, node, i)
        for i, found in enumerate(outputs(node, count))
    ]


def strided(node: Node) -> tuple[Node, int, int]:
    """(what is in memory, offset, row stride) of a value that may be a slice of the last axis."""
    if node.target is aten.slice.Tensor and len(node.args) == 4:
        x, dim, start, _ = node.args
        assert isinstance(x, Node) and isinstance(start, int)
        if dim == value(x).dim() - 1:
            return x, start, int(value(x).shape[-1])
    return node, 0, int(value(node).shape[-1])
