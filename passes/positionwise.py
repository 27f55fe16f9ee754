"""The proof behind K/V reuse: outside attention, no position sees another."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from dcompile.errors import MixesPositions
from dcompile.ir import operators
from dcompile.ir.evaluate import fixed_nodes
from dcompile.ir.meta import facts
from dcompile.ir.program import Program
from dcompile.ir.show import show_node
from dcompile.ir.sizes import expression, is_static

aten = torch.ops.aten

# Each value of the output depends on the values at the same place of the inputs (broadcast).
POINTWISE_TAGS = {torch.Tag.pointwise}
POINTWISE = {
    aten._to_copy.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.expand.default,
    aten.type_as.default,
    aten.softplus.default,
    aten.mish.default,
    aten.glu.default,
    aten.add.Tensor,
    aten.rms_norm.default,
    aten.layer_norm.default,
    aten.embedding.default,
}
# Reduce or reorder along dims given by an argument, which must not be the sequence.
ALONG = {
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten.log_softmax.int: 1,
    aten.sum.dim_IntList: 1,
    aten.mean.dim: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.any.dim: 1,
    aten.all.dim: 1,
    aten.prod.dim_int: 1,
    aten.var.correction: 1,
    aten.logsumexp.default: 1,
    aten.linalg_vector_norm.default: 2,
    aten.cumsum.default: 1,
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.gather.default: 1,
    aten.scatter.src: 1,
    aten.scatter.value: 1,
    aten.scatter_add.default: 1,
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.sort.stable: 2,
    aten.argsort.default: 1,
    aten.flip.default: 1,
}
DEFAULT_LAST = {aten.topk.default, aten.sort.default, aten.argsort.default}


def prove(program: Program, attentions: set[Node]) -> None:
    """Raise MixesPositions at the first node that lets a position of the sequence see another.

    Walks the values that depend on tokens and run along the sequence, from the ids to the place where
    rows are chosen for the vocabulary; `attentions` are exempt, they are what reuse_kv rewrites.
    """
    fixed = fixed_nodes(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or node in fixed or node in attentions:
            continue
        if not any(sequence_axes(program, a) for a in _tensors(node)) or _is_choice(node):
            continue
        if node.target is operator.getitem or node.target in ROW_BY_ROW:
            continue
        reason = _mixes(program, node, fixed)
        if reason:
            raise MixesPositions(
                f"{reason}, so keys and values of other positions cannot be reused",
                where=f"{facts(node).origin or 'the model'}: {show_node(node, program)}",
                remedy="let only attention (scaled_dot_product_attention) look across positions",
            )


def sequence_axes(program: Program, node: Node) -> list[int]:
    """The axes of a value whose size is a multiple of the number of rows."""
    val = node.meta.get("val")
    if isinstance(val, (tuple, list)):
        val = val[0]
    if not isinstance(val, torch.Tensor):
        return []
    rows = {s for s, name in program.symbols.items() if name == "R"}
    return [
        i
        for i, d in enumerate(val.shape)
        if not is_static(d) and rows & {str(s) for s in expression(d).free_symbols}
    ]


def _tensors(node: Node) -> list[Node]:
    return [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), (torch.Tensor, tuple))]


def _is_choice(node: Node) -> bool:
    """The ids read from the canvas, and the rows picked for the vocabulary: row by row by nature."""
    if node.target is not aten.index.Tensor:
        return False
    table, indices = node.args
    assert isinstance(table, Node) and isinstance(indices, (list, tuple))
    names = [i.name for i in indices if isinstance(i, Node) and i.op == "placeholder"]
    return names in (["row_seq", "row_pos"], ["choice_row"], ["row_pos"])


# They say themselves what each row is: the mixture of its own logits, and where it is kept.
ROW_BY_ROW = {operators.SOFT_EMBED, operators.WRITE_ROWS}


def _mixes(program: Program, node: Node, fixed: set[Node]) -> str:
    """Why the node mixes positions; empty where it provably does not."""
    moving = [a for a in _tensors(node) if sequence_axes(program, a)]
    if any(len(sequence_axes(program, a)) > 1 for a in [*moving, node]):
        return "it computes a value for each pair of positions"
    target = node.target
    if target in (aten.linear.default,):
        return _linear(program, node)
    if target is aten.einsum.default:
        return _einsum(program, node)
    if target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matmul(program, node)
    if target in (operators.ROUTE, operators.MOE_FFN):
        # Both take and give rows along their first axis.
        return "" if all(_axis(program, a) == 0 for a in moving) else "it routes along another axis"
    if target is aten.reshape.default:
        return _reshape(program, node)
    if target is aten.permute.default:
        return ""
    if target is aten.cat.default:
        return _cat(program, node)
    if target is aten.index.Tensor:
        return _index(program, node)
    if target in ALONG:
        return _along(program, node)
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else []
    if target in POINTWISE or torch.Tag.pointwise in tags:
        return _pointwise(program, node)
    return f"{getattr(target, '__name__', target)} is not known to treat each position by itself"


def _axis(program: Program, node: Node) -> int | None:
    axes = sequence_axes(program, node)
    return axes[0] if axes else None


def _pointwise(program: Program, node: Node) -> str:
    out = node.meta["val"]
    axis = _axis(program, node)
    if axis is None:
        return "it reduces the sequence away"
    if node.target in (aten.rms_norm.default, aten.layer_norm.default):
        normalized = len(node.args[1])  # type: ignore[arg-type]
        return "it normalises over positions" if axis >= out.dim() - normalized else ""
    if node.target is aten.embedding.default:
        weight, ids = node.args[:2]
        assert isinstance(weight, Node) and isinstance(ids, Node)
        if sequence_axes(program, weight):
            return "it looks up other positions"
        return "" if _axis(program, ids) == axis else "it looks up other positions"
    for arg in _tensors(node):
        mine = _axis(program, arg)
        if mine is not None and arg.meta["val"].dim() - mine != out.dim() - axis:
            return "it combines a position with others"
    return ""


def _along(program: Program, node: Node) -> str:
    x = node.args[0]
    assert isinstance(x, Node)
    index = ALONG[node.target]
    default = -1 if node.target in DEFAULT_LAST else None
    dims = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    if dims is None:
        return "it reduces over all positions"
    rank = x.meta["val"].dim()
    listed = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]  # type: ignore[operator]
    axis = _axis(program, x)
    if axis in listed or (axis is not None and not listed):
        return "it works along the sequence"
    others = [a for a in _tensors(node) if a is not x and _axis(program, a) not in (None, axis)]
    return "it combines a position with others" if others else ""


def _linear(program: Program, node: Node) -> str:
    x, *rest = (a for a in node.args if isinstance(a, Node))
    if any(sequence_axes(program, w) for w in rest):
        return "it multiplies positions with each other"
    axis = _axis(program, x)
    return "it adds up over positions" if axis == x.meta["val"].dim() - 1 else ""


def _matmul(program: Program, node: Node) -> str:
    a, b = node.args[:2]
    assert isinstance(a, Node) and isinstance(b, Node)
    at, bt = _axis(program, a), _axis(program, b)
    if at is not None and at == a.meta["val"].dim() - 1:
        return "it adds up over positions"
    if bt is not None and bt == b.meta["val"].dim() - 2:
        return "it adds up over positions"
    if at is not None and bt is not None:
        same_batch = a.meta["val"].dim() - at == b.meta["val"].dim() - bt > 2
        return "" if same_batch else "it multiplies positions with each other"
    return ""


def _einsum(program: Program, node: Node) -> str:
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    terms, _, out = equation.replace(" ", "").partition("->")
    letters = set()
    for term, operand in zip(terms.split(","), operands, strict=True):
        assert isinstance(operand, Node)
        axis = _axis(program, operand)
        if axis is not None:
            if "." in term:
                return "its equation has an ellipsis"
            letters.add(term[axis])
    if len(letters) != 1:
        return "it multiplies positions with each other"
    return "" if letters <= set(out) else "it adds up over positions"


def _reshape(program: Program, node: Node) -> str:
    """The sequence stays one axis, with the same number of values before it."""
    x = node.args[0]
    assert isinstance(x, Node)
    before, after = (_axis(program, n) for n in (x, node))
    if before is None or after is None:
        return "it splits the sequence"
    shapes = (x.meta["val"].shape, node.meta["val"].shape)
    if expression(shapes[0][before]) != expression(shapes[1][after]):
        return "it merges the sequence with another axis"
    outer = []
    for shape, axis in zip(shapes, (before, after), strict=True):
        product = 1
        for d in shape[:axis]:
            product *= int(d)
        outer.append(product)
    return "" if outer[0] == outer[1] else "it moves values between positions"


def _cat(program: Program, node: Node) -> str:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % node.meta[
        "val"
    ].dim()  # type: ignore[operator]
    axes = {_axis(program, p) for p in parts if isinstance(p, Node)}
    if len(axes) != 1 or None in axes:
        return "it joins the sequence with something else"
    return "it joins sequences" if dim in axes else ""


def _index(program: Program, node: Node) -> str:
    """table[index] with a table that has no positions: a lookup for each position."""
    x, indices = node.args
    assert isinstance(x, Node) and isinstance(indices, (list, tuple))
    if sequence_axes(program, x):
        return "it picks positions by value"
    return "" if len([i for i in indices if i is not None]) == 1 else "it picks by several indices"
