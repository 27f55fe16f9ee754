"""The program: one denoising iteration as an FX graph, with what its inputs and outputs mean."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch.fx import GraphModule, Node

from dcompile.ir.remarks import Remark
from dcompile.ir.weights import Recipe


class Stage(enum.Enum):
    """How far a program has come, and so what the contract allows in it."""

    TRACED = "traced"  # as exported: a whole sequence in, attention over all of it
    PLANNED = "planned"  # rows instead of a sequence, keys and values carried, fused operators
    BOUND = "bound"  # every value has its buffer and its region


class Exactness(enum.Enum):
    """What a pass keeps."""

    EXACT = "exact"  # the same bits
    ROUNDING = "rounding"  # the same mathematics, another order of additions
    APPROXIMATE = "approximate"  # another algorithm, only ever by the user's choice


Kind = Literal["weight", "constant", "state", "step"]
Holds = Literal["canvas", "kv", "policy", "soft"]
"""What a state is: the tokens, keys or values, a decoding policy's own, the mixtures of smoothing."""


@dataclass(frozen=True)
class Input:
    """One placeholder of the graph, in order.

    A weight is made by its recipe from the checkpoint, a constant was computed by the compiler, a
    state survives the iteration, a step input is given anew for each.  `holds` says of a state what it
    is, because the loop treats tokens, keys and values, and a policy's own each in another way.
    """

    name: str
    kind: Kind
    holds: Holds | None = None


@dataclass(frozen=True)
class Output:
    """One value that the graph returns; `state` names the input that it becomes next iteration."""

    name: str
    state: str | None = None


@dataclass(frozen=True)
class StepShape:
    """What the compiler fixed: slots, positions a slot, block length, and the model's own numbers."""

    slots: int
    positions: int
    block_length: int
    mask_id: int
    dtype: torch.dtype
    model_block: int | None = None  # of a block-causal attention mask, set by reuse_kv
    shift: bool = False
    blocks: int = 1  # of a slot that may be undecided at a time


@dataclass
class Program:
    """One denoising iteration.

    `symbols` maps the export's symbol names to ours: R rows computed, B sequences active.  Every other
    size is static.  `recipes` says how each weight is made, `constants` holds what was folded.
    """

    module: GraphModule
    inputs: list[Input]
    outputs: list[Output]
    shape: StepShape
    recipes: dict[str, Recipe]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    stage: Stage = Stage.TRACED
    remarks: list[Remark] = field(default_factory=list)
    known: dict[object, Any] = field(default_factory=dict)  # values of calls; see edit.propagate

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    def nodes(self) -> list[Node]:
        return list(self.graph.nodes)

    def calls(self, *targets: object) -> Iterator[Node]:
        """The nodes that call one of `targets`, in order; safe against changes while iterating."""
        wanted = set(targets)
        for node in self.nodes():
            if node.op == "call_function" and node.target in wanted:
                yield node

    def placeholder(self, name: str) -> Node:
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        raise KeyError(name)

    def input(self, name: str) -> Input:
        return next(i for i in self.inputs if i.name == name)

    def result(self) -> Node:
        """The output node."""
        return self.graph.output_node()


class Pass(Protocol):
    """Rewrites a program in place and returns how many places it changed.

    The program keeps the contract of its stage before and after, not in between.  A pass does not
    lint, recompile, clean up, time or print: the pipeline does, the same way after every pass.
    """

    @property
    def exactness(self) -> Exactness: ...

    def __call__(self, program: Program) -> int: ...
