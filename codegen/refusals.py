"""What is said of an operator that a target has no kernel for."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcompile.errors import UnsupportedModel
from dcompile.ir.program import Program
from dcompile.ir.show import show_node, show_value, target_name

_REMEDY = "--skip the pass that makes it, or give it a kernel: CONTRIBUTING.md, Add an operator"


def no_kernel(
    program: Program, node: Node, target: str, known: bool, remedy: str | None
) -> UnsupportedModel:
    """The refusal of `node`, where `target` (CPU, CUDA) has no kernel at all, or `known` ones for others.

    `remedy` is what the target's table says of an operator that has none of its own.
    """
    name, where = target_name(node), show_node(node, program)
    if not known:
        what = f"{name} has no {target} kernel"
        return UnsupportedModel(what, where=where, remedy=remedy or _REMEDY)
    values = [n.meta["val"] for n in node.all_input_nodes]
    given = ", ".join(show_value(v, program) for v in values if isinstance(v, torch.Tensor))
    what = f"no {target} kernel of {name} takes these dtypes and shapes: {given}"
    remedy = "--dtype float32, which makes all of one dtype, or --skip the pass that makes it"
    return UnsupportedModel(what, where=where, remedy=remedy)
