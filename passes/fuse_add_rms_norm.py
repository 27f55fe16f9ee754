"""rms_norm(x + r)  ->  add_rms_norm(x, r), which gives the sum as well"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.edit import bypass, insert, item, value
from dcompile.ir.meta import facts
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark
from dcompile.passes.canonicalize import same_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseAddRMSNorm:
    """The residual sum and its norm in one trip through memory."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = [n for n in program.calls(aten.rms_norm.default) if _is_residual(n)]
        fused_ones = set(sites)
        for norm in program.calls(aten.rms_norm.default):
            if norm not in fused_ones:
                where, why = facts(norm).origin or norm.name, _why(norm)
                program.remarks.append(Remark("fuse_add_rms_norm", where, why))
        for norm in sites:
            add, _, weight, eps = (*norm.args, None, None)[:4]
            assert isinstance(add, Node)
            fused = insert(program, add, operators.ADD_RMS_NORM, *add.args, weight, eps, like=norm)
            total, normed = item(program, add, fused, 0), item(program, add, fused, 1)
            bypass(program, norm, normed)
            bypass(program, add, total)
        return len(sites)


def _why(norm: Node) -> str:
    add, shape = norm.args[:2]
    if not isinstance(add, Node) or add.target is not aten.add.Tensor:
        return "what is normed is no sum"
    if add.kwargs or len(norm.args) < 4 or norm.args[3] is None or len(shape) != 1:  # type: ignore[arg-type]
        return "the sum is scaled, or the norm is over several axes or without an epsilon"
    return "another norm of the same sum has it, or its sides differ in shape or dtype"


def _is_residual(norm: Node) -> bool:
    add, shape = norm.args[:2]
    if not isinstance(add, Node) or add.target is not aten.add.Tensor or add.kwargs:
        return False
    if len(norm.args) < 4 or norm.args[3] is None or len(shape) != 1:  # type: ignore[arg-type]
        return False
    first = next(u for u in _in_order(add) if u.target is aten.rms_norm.default)
    sides = [a for a in add.args if isinstance(a, Node)]
    if len(sides) != 2 or first is not norm:
        return False
    out = value(add)
    return all(same_shape(value(s).shape, out.shape) and value(s).dtype == out.dtype for s in sides)


def _in_order(node: Node) -> list[Node]:
    users = set(node.users)
    return [n for n in node.graph.nodes if n in users]
