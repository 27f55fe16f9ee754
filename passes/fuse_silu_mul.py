"""silu(gate) * up  ->  silu_mul(gate, up)"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.edit import replace, value
from dcompile.ir.meta import facts
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark
from dcompile.passes.canonicalize import same_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseSiluMul:
    """Fuse the gate of a gated FFN; saves one trip of the activation through memory."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = [n for n in program.calls(aten.mul.Tensor) if _gate(n) is not None]
        fused = {_gate(n) for n in sites}
        for silu in program.calls(aten.silu.default):
            if silu not in fused:
                why = _why(silu)
                program.remarks.append(
                    Remark("fuse_silu_mul", facts(silu).origin or silu.name, why)
                )
        for node in sites:
            gate = _gate(node)
            assert gate is not None
            (up,) = [a for a in node.args if a is not gate]
            replace(program, node, operators.SILU_MUL, gate.args[0], up)
        return len(sites)


def _why(silu: Node) -> str:
    if len(silu.users) != 1:
        return f"silu is read {len(silu.users)} times, so it would stay"
    (reader,) = silu.users
    if reader.target is not aten.mul.Tensor:
        return "silu is not multiplied with anything"
    return "silu and what it is multiplied with differ in shape or dtype"


def _gate(node: Node) -> Node | None:
    sides = [a for a in node.args if isinstance(a, Node)]
    gates = [a for a in sides if a.target is aten.silu.default]
    # A second reader of silu() would make it stay, and then nothing is saved.
    if len(sides) != 2 or len(gates) != 1 or len(gates[0].users) != 1:
        return None
    a, b = (value(s) for s in sides)
    return gates[0] if same_shape(a.shape, b.shape) and a.dtype == b.dtype else None
