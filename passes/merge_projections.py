"""linear(x, q), linear(x, k), linear(x, v)  ->  slices of linear(x, qkv); gate and up likewise"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir.edit import add_weight, fake_mode, insert, replace, value
from dcompile.ir.meta import facts, note
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark
from dcompile.ir.weights import Concat

aten = torch.ops.aten
GROUPS = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True)
class MergeProjections:
    """One product instead of three (two): the rows are read once, and there are fewer launches."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        by_input: dict[Node, dict[str, Node]] = defaultdict(dict)
        for node in program.calls(aten.linear.default):
            if facts(node).role:
                by_input[node.args[0]][facts(node).role] = node  # type: ignore[index]
        merged = 0
        for found in by_input.values():
            for group in GROUPS:
                if all(r in found for r in group):
                    merged += _merge(program, [found[r] for r in group], "_".join(group))
                elif part := next((found[r] for r in group if r in found), None):
                    lacking = ", ".join(r for r in group if r not in found)
                    _leave(program, part, f"{lacking}: no product of the same rows")
        return merged


def _merge(program: Program, parts: list[Node], name: str) -> int:
    operands = list(zip(*((*p.args, None)[1:3] for p in parts), strict=True))
    weights, biases = operands
    if any(b is None for b in biases) != all(b is None for b in biases):
        return _leave(program, parts[0], "some of the products have a bias and some have none")
    held = [o for o in (*weights, *biases) if isinstance(o, Node)]
    if any(o.name not in program.recipes for o in held):
        return _leave(program, parts[0], "a weight is computed, or is part of another")
    first = min(parts, key=program.nodes().index)
    layer = facts(first).layer
    stem = f"layers_{layer}_{name}" if layer is not None else f"{first.name}_{name}"
    args = [first.args[0], _joined(program, stem, weights)]
    if biases[0] is not None:
        args.append(_joined(program, stem + "_bias", biases))
    whole = insert(program, first, aten.linear.default, *args, like=first)
    note(whole, role="qkv" if len(parts) == 3 else "gate_up")
    start = 0
    for part in parts:
        size = int(value(part).shape[-1])
        axis = value(part).dim() - 1
        replace(program, part, aten.slice.Tensor, whole, axis, start, start + size)
        start += size
    return 1


def _leave(program: Program, node: Node, why: str) -> int:
    program.remarks.append(Remark("merge_projections", facts(node).origin or node.name, why))
    return 0


def _joined(program: Program, name: str, parts: tuple[object, ...]) -> Node:
    nodes = [p for p in parts if isinstance(p, Node)]
    recipe = Concat(tuple(program.recipes[n.name] for n in nodes))
    with fake_mode(program):
        like = torch.cat([value(n) for n in nodes])
    return add_weight(program, name, recipe, like)
