"""f(x)[choice_row]  ->  f(x[choice_row]): what only the chosen rows need, only they compute

Input (R rows run; B blocks of 8 positions choose tokens):

    attend_default_1: f32[R, 4, 16] = dcompile.attend(getitem_15, getitem_16, getitem_17, row_seq, ...)
    ...
    linear_5: f32[1, R, 131] = linear.default(getitem_25, lm_head_weight)
    reshape_default_11: f32[R, 131] = reshape.default(linear_5, [-1, 131])
    index_1: f32[B, 8, 131] = index.Tensor(reshape_default_11, [choice_row])

Output, tidied:

    reshape_default_39: i64[8*B] = reshape.default(choice_row, [-1])
    index_select_default: f32[8*B, 4, 16] = index_select.default(getitem_15, 0, reshape_default_39)
    index_select_default_1: i64[8*B] = index_select.default(row_seq, 0, reshape_default_39)
    attend_default_1: f32[8*B, 4, 16] = dcompile.attend(index_select_default, getitem_16, getitem_17, ...)
    ...
    linear_5: f32[1, 8*B, 131] = linear.default(getitem_25, lm_head_weight)
    reshape_default_41: f32[B, 8, 131] = reshape.default(linear_5, [-1, 8, 131])
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.edit import insert, propagate, replace, value
from dcompile.ir.meta import facts
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark
from dcompile.passes.positionwise import sequence_axes

aten = torch.ops.aten


# What they give a row depends on the other rows of its sequence.
BARRIERS = {operators.NORM_ROPE_WRITE, operators.WRITE_ROWS, operators.ROUTE_LIMITED}


@dataclass(frozen=True)
class NarrowWindow:
    """Move the choice of rows from the logits up to the last attention's queries.

    Everything that is read at the block's positions only (the vocabulary projection, the last layer's
    feed-forward, its queries) is computed for those rows, however many rows refresh keys and values.
    """

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = [n for n in program.calls(aten.index.Tensor) if _chooses_rows(n)]
        return sum(_narrow(program, node) for node in sites)


def _chooses_rows(node: Node) -> bool:
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    index, *rest = indices
    return not rest and isinstance(index, Node) and index.name == "choice_row"


def _narrow(program: Program, choice: Node) -> int:
    region = _only_for(program, choice)
    if not region:
        why = "every row is needed up to the choice of rows"
        program.remarks.append(Remark("narrow_window", facts(choice).origin or choice.name, why))
        return 0
    rows = program.placeholder("choice_row")
    inside = set(region)
    first = region[0]
    flat = insert(program, first, aten.reshape.default, rows, [-1], like=choice)
    gathered: dict[Node, Node] = {}
    for node in region:
        for arg in node.all_input_nodes:
            if arg in inside or not sequence_axes(program, arg):
                continue
            if arg not in gathered:
                (axis,) = sequence_axes(program, arg)
                gathered[arg] = insert(
                    program, node, aten.index_select.default, arg, axis, flat, like=node
                )
            node.replace_input_with(arg, gathered[arg])
    for node in region:
        propagate(program, node)
    source = choice.args[0]
    assert isinstance(source, Node)
    static = [int(d) for d in value(choice).shape[1:]]
    replace(program, choice, aten.reshape.default, source, [-1, *static])
    return len(region)


def _only_for(program: Program, choice: Node) -> list[Node]:
    """Nodes that nothing but the chosen rows needs, in order; caches are read, not narrowed."""
    wanted = {choice}
    out = []
    for node in reversed(program.nodes()):
        if node.op != "call_function" or node is choice or not node.users:
            continue
        if node.target in BARRIERS or not sequence_axes(program, node):
            continue
        # Ids and gathers of tables are cheaper to compute than to gather.
        if node.target in (aten.index.Tensor, aten.embedding.default):
            continue
        if all(user in wanted for user in node.users):
            wanted.add(node)
            out.append(node)
    # An output of a node that stays is gathered, not narrowed.
    return [n for n in out[::-1] if n.target is not operator.getitem or n.args[0] in wanted]
