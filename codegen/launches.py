"""The launch list: which values a launch reads and writes, before anyone says where they live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import Node

from dcompile.codegen.triton.variant import Expression, Variant
from dcompile.ir.sizes import Size


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
    touches: str = ""  # of an emitted function: its arguments in the notation of runtime/abi.py
    variant: Variant | None = None  # of a CUDA launch
    grid: tuple[Expression, ...] = ()

    def reads(self) -> list[Node]:
        if self.kind == "aten":
            inputs = self.node.all_input_nodes
            return [n for n in inputs if isinstance(n.meta["val"], torch.Tensor)]
        return [a.node for a in self.args if isinstance(a, Value) and a.node is not None]
