"""soft_embed(linear(x, w), table)  ->  vocab_soft_embed(x, w, table): the logits are never stored"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.errors import UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.edit import insert, through, value
from dcompile.ir.meta import facts, note
from dcompile.ir.program import Exactness, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseSoftEmbed:
    """The vocabulary projection, its softmax and the mixture of embeddings, over masked rows only."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        return sum(_fuse(program, node) for node in program.calls(operators.SOFT_EMBED))


def _fuse(program: Program, node: Node) -> int:
    linear = through(node.args[0], aten.reshape.default)
    if linear is None or linear.target is not aten.linear.default:
        raise UnsupportedModel(
            "iteration smoothing needs logits that are a linear layer's output",
            where=facts(node).origin or node.name,
            remedy="leave --smoothing out",
        )
    x, weight, bias = (*linear.args, None)[:3]
    assert isinstance(x, Node)
    rows = insert(program, node, aten.reshape.default, x, [-1, int(value(x).shape[-1])])
    fused = insert(
        program, node, operators.VOCAB_SOFT_EMBED, rows, weight, bias, *node.args[1:], like=linear
    )
    note(fused, role="head")
    node.replace_all_uses_with(fused)
    program.graph.erase_node(node)
    return 1
