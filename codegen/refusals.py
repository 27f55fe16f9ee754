"""What is said of an operator that a target has no kernel for."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcompile.errors import UnsupportedModel
from dcompile.ir.program import Program
from dcompile.ir.show import show_node, show_value, target_name

_NO_KERNEL = "--skip the pass that makes it, or give it a kernel: CONTRIBUTING.md, Add an operator"
_NOT_FOR_THESE = "--dtype float32, which makes all of one dtype, or --skip the pass that makes it"


def no_kernel(
    program: Program, node: Node, target: str, known: bool, remedy: str | None
) -> UnsupportedModel:
    """The refusal of `node` by a target, CPU or CUDA.

    `known` where the target has kernels of the operator, but none for these dtypes and shapes; `remedy`
    where its table says what to do instead.
    """
    name, where = target_name(node), show_node(node, program)
    if not known:
        what = f"{name} has no {target} kernel"
        return UnsupportedModel(what, where=where, remedy=remedy or _NO_KERNEL)
    values = [n.meta["val"] for n in node.all_input_nodes]
    given = ", ".join(show_value(v, program) for v in values if isinstance(v, torch.Tensor))
    what = f"no {target} kernel of {name} takes these dtypes and shapes: {given}"
    return UnsupportedModel(what, where=where, remedy=remedy or _NOT_FOR_THESE)
