"""What a value of the graph is, when it depends on nothing but the number of rows."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.utils._pytree import tree_map

from dcompile.ir.program import Program


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
    pending = [node]
    while pending:
        top = pending[-1]
        if top in known:
            pending.pop()
            continue
        if top.op == "placeholder":
            known[top] = program.constants[top.name]
            continue
        if top.target is torch.ops.aten.sym_size.int:
            known[top] = _size(top, program, rows)
            continue
        missing = [a for a in top.all_input_nodes if a not in known]
        if missing:
            pending.extend(missing)
            continue
        args = tree_map(lambda a: known[a] if isinstance(a, Node) else a, top.args)
        kwargs = tree_map(lambda a: known[a] if isinstance(a, Node) else a, top.kwargs)
        assert callable(top.target)
        known[top] = top.target(*args, **kwargs)
    out = known[node]
    assert isinstance(out, torch.Tensor)
    return out


def _size(node: Node, program: Program, rows: int) -> int:
    from dcompile.ir.sizes import evaluate as number
    from dcompile.ir.sizes import size_of

    return number(size_of(node.meta["val"], program.symbols), {"R": rows, "B": 1})
