"""What holds of a program after every pass; cheap enough to check each time."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from dcompile.errors import ContractError
from dcompile.ir.meta import KEY, Facts
from dcompile.ir.program import Program, Stage
from dcompile.ir.show import show_node

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def verify(program: Program, after: str) -> None:
    """Raise ContractError naming the pass `after`, the node, and what it breaks."""

    def broken(what: str, node: Node | None = None) -> ContractError:
        where = None if node is None else show_node(node, program)
        return ContractError(
            f"after {after}: {what}", where=where, remedy=f"report it; --skip {after} leaves it out"
        )

    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    if [n.name for n in holders] != [i.name for i in program.inputs]:
        raise broken("the placeholders are not the program's inputs, in order")
    for item in program.inputs:
        if item.kind == "weight" and item.name not in program.recipes:
            raise broken(f"the weight {item.name} has no recipe")
        if item.kind == "constant" and item.name not in program.constants:
            raise broken(f"the constant {item.name} has no value")
    seen: set[Node] = set()
    for node in program.graph.nodes:
        if any(a not in seen for a in node.all_input_nodes):
            raise broken("it is read before it is computed", node)
        seen.add(node)
        if node.op == "output":
            if len(node.args[0]) != len(program.outputs):
                raise broken("the graph's outputs are not the program's")
            continue
        if node.op not in ("placeholder", "call_function"):
            raise broken(f"{node.op} is not allowed", node)
        # Export leaves assertions, which have no value and no readers.
        if node.meta.get("val") is None and node.users:
            raise broken("it has no value in its metadata", node)
        if not isinstance(node.meta.get(KEY, Facts()), Facts):
            raise broken("its facts are not a Facts record", node)
        if node.op == "call_function":
            _verify_call(program, node, broken)


def _verify_call(program: Program, node: Node, broken) -> None:  # type: ignore[no-untyped-def]
    target = node.target
    if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
        raise broken("only ATen, dcompile and getitem calls are allowed", node)
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        raise broken("the graph is functional", node)
    if target is SDPA and program.stage is not Stage.TRACED:
        raise broken("attention over a whole sequence is left after reuse_kv", node)
