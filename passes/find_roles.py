"""Say what each linear layer is for: q, k, v, qkv, o, gate, up, down, head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.meta import note
from dcompile.ir.program import Exactness, Program

aten = torch.ops.aten
LINEAR = aten.linear.default
STEPS_BACK = 40  # a norm and a rotary embedding are about fifteen nodes


@dataclass(frozen=True)
class FindRoles:
    """Mark the linear layers around attention, gated FFNs and the choice of tokens."""

    exactness = Exactness.EXACT

    def __call__(self, program: Program) -> int:
        roles: dict[Node, set[str]] = {}
        for node in program.calls(operators.ATTEND):
            q, keys, values = node.args[:3]
            for role, start in (("q", q), ("k", _written(keys)), ("v", _written(values))):
                _add(roles, _source(start), role)
            _add(roles, _reader(node), "o")
        for node in program.calls(aten.mul.Tensor):
            sides = [a for a in node.args if isinstance(a, Node)]
            gates = [a for a in sides if a.target is aten.silu.default]
            if len(gates) == 1 and len(sides) == 2:
                (up,) = [a for a in sides if a is not gates[0]]
                _add(roles, _source(gates[0]), "gate")
                _add(roles, _source(up), "up")
                _add(roles, _reader(node), "down")
        for node in program.calls(operators.CHOOSE):
            _add(roles, _source(node.args[0]), "head")
        for node, names in roles.items():
            note(node, role="qkv" if names == {"q", "k", "v"} else min(names))
        return len(roles)


def _add(roles: dict[Node, set[str]], node: Node | None, role: str) -> None:
    if node is not None:
        roles.setdefault(node, set()).add(role)


def _written(cache: object) -> object:
    return (
        cache.args[1] if isinstance(cache, Node) and cache.target is operators.WRITE_ROWS else None
    )


def _source(start: object) -> Node | None:
    """The one linear layer that a value comes from, through operators of the same layer."""
    pending: list[object] = [start]
    found: set[Node] = set()
    seen: set[Node] = set()
    while pending and len(seen) < STEPS_BACK:
        node = pending.pop()
        if not isinstance(node, Node) or node.op != "call_function" or node in seen:
            continue
        seen.add(node)
        if node.target is LINEAR:
            found.add(node)
        elif node.target not in (operators.ATTEND, aten.embedding.default, aten.einsum.default):
            pending.extend(node.all_input_nodes)
    return found.pop() if len(found) == 1 and not pending else None


def _reader(node: Node) -> Node | None:
    """The linear layer that reads a value, through views."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is LINEAR:
            return node
        if node.target not in (aten.reshape.default, aten.permute.default, aten._to_copy.default):
            break
    return None
