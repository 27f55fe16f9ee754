"""choose(linear(x, w))  ->  vocab_choice(x, w): the logits are never stored"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.edit import insert, through, value
from dcompile.ir.meta import facts, note
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark

aten = torch.ops.aten
FUSED = {
    operators.CHOOSE: operators.VOCAB_CHOICE,
    operators.CHOOSE_ASKED: operators.VOCAB_CHOICE_ASKED,
}


@dataclass(frozen=True)
class FuseVocabChoice:
    """The vocabulary projection with its softmax statistics, over the candidate rows only."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        return sum(_fuse(program, node) for node in program.calls(*FUSED))


def _fuse(program: Program, node: Node) -> int:
    linear = through(node.args[0], aten.reshape.default)
    if linear is None or linear.target is not aten.linear.default or len(linear.users) != 1:
        why = "the logits are not a linear layer's output"
        program.remarks.append(Remark("fuse_vocab_choice", facts(node).origin or node.name, why))
        return 0
    x, weight, bias = (*linear.args, None)[:3]
    assert isinstance(x, Node)
    size = int(value(x).shape[-1])
    n = int(value(node.args[1]).shape[1])  # type: ignore[arg-type]
    rows = insert(program, node, aten.reshape.default, x, [-1, n, size])
    target = FUSED[node.target]
    fused = insert(program, node, target, rows, weight, bias, *node.args[1:], like=linear)
    note(fused, role="head")
    node.replace_all_uses_with(fused)
    program.graph.erase_node(node)
    return 1
