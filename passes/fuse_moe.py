"""router, top-k, experts, weighted sum  ->  route + moe_ffn, which reads only chosen experts

However it is written: the output's element is read as a formula (moe/reading.py, moe/operators.py),
multiplied out (moe/algebra.py), and must be, for each row r and feature d,

    sum over slots j of  weight(r, j) * expert[chosen(r, j)](x[r])[d]

or that sum taken apart by experts, each where it was chosen.  What is not provably so stays as it is.

Input, of many spellings one (tests/golden/tiny_moe, 8 experts of which a row chooses 3):

    softmax: f32[1, R, 8] = softmax.int(linear_4, -1, f32)
    topk: (f32[1, R, 3], i64[1, R, 3]) = topk.default(softmax, 3)
    getitem: f32[1, R, 3] = getitem(topk, 0)
    getitem_1: i64[1, R, 3] = getitem(topk, 1)
    zeros_like: f32[1, R, 8] = zeros_like.default(softmax, pin_memory=False)
    scatter: f32[1, R, 8] = scatter.src(zeros_like, -1, getitem_1, getitem)
    einsum: f32[1, R, 8, 24] = einsum.default('btd,efd->btef', [rms_norm_3, gate])
    einsum_1: f32[1, R, 8, 24] = einsum.default('btd,efd->btef', [rms_norm_3, up])
    silu: f32[1, R, 8, 24] = silu.default(einsum)
    mul_152: f32[1, R, 8, 24] = mul.Tensor(silu, einsum_1)
    einsum_2: f32[1, R, 64] = einsum.default('btef,edf,bte->btd', [mul_152, down, scatter])

Output, where gate_up [8, 48, 64] are the experts' gates and ups, stacked expert by expert:

    reshape_default_19: f32[R, 8] = reshape.default(linear_4, [-1, 8])
    route_default: (f32[R, 3], i32[R, 3]) = dcompile.route(reshape_default_19, None, 3, 'softmax', ...)
    getitem_8: f32[R, 3] = getitem(route_default, 0)
    getitem_9: i32[R, 3] = getitem(route_default, 1)
    reshape_default_20: f32[R, 64] = reshape.default(rms_norm_3, [-1, 64])
    moe_ffn_default: f32[R, 64] = dcompile.moe_ffn(reshape_default_20, getitem_8, getitem_9, gate_up, ...)
    reshape_default_21: f32[1, R, 64] = reshape.default(moe_ffn_default, [1, -1, 64])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import operators
from dcompile.ir.edit import add_weight, bypass, fake_mode, insert, item, value
from dcompile.ir.meta import facts, note
from dcompile.ir.program import Exactness, Program
from dcompile.ir.remarks import Remark
from dcompile.ir.sizes import is_static
from dcompile.ir.weights import Stack
from dcompile.passes.moe.algebra import NotProven
from dcompile.passes.moe.experts import Expert, View, stacked
from dcompile.passes.moe.operators import HANDLERS
from dcompile.passes.moe.proof import Mixture, prove
from dcompile.passes.moe.reading import MOVES, Reader, is_choice
from dcompile.passes.moe.router import Router

aten = torch.ops.aten
VIEW = aten.reshape.default
COMBINES = {
    aten.add.Tensor,
    aten.sum.dim_IntList,
    aten.einsum.default,
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten.where.self,
}


@dataclass(frozen=True)
class FuseMoE:
    """Recognise mixtures of experts by what they compute; ties go to the expert of lowest index."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        count = _stack_weights(program)
        claimed: set[Node] = set()
        for choice in [n for n in program.nodes() if is_choice(n)]:
            if not choice.users:
                continue
            count += _fuse(program, choice, claimed)
        _remark_dense(program, claimed)
        return count


def _stack_weights(program: Program) -> int:
    """stack(weights), made in every step, is a weight of its own."""
    sites = [
        n
        for n in program.calls(aten.stack.default)
        if all(p.name in program.recipes for p in n.all_input_nodes) and n.args[1:] in ((), (0,))
    ]
    for node in sites:
        made = Stack(tuple(program.recipes[p.name] for p in node.args[0]))  # type: ignore
        name = f"{node.args[0][0].name}_stack"  # type: ignore[index,union-attr]
        bypass(program, node, add_weight(program, name, made, value(node)))
    return len(sites)


def _fuse(program: Program, choice: Node, claimed: set[Node]) -> int:
    """Replace the first value after a choice that is provably a mixture of the chosen experts."""
    reader = Reader(program, _ancestors(choice), handlers=HANDLERS)
    cone = _cone(program, choice)
    best: NotProven | None = None
    for root in [n for n in cone if _may_combine(program, n, cone)]:
        try:
            found = prove(reader, choice, root, cone)
        except NotProven as failure:
            if best is None or failure.near > best.near:
                best = failure
            continue
        _rewrite(program, root, found)
        return 1
    claimed |= set(cone)
    if best is not None and best.near:
        where = facts(choice).origin or choice.name
        program.remarks.append(Remark("fuse_moe", where, str(best)))
    return 0


def _ancestors(node: Node) -> set[Node]:
    out: set[Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        top = pending.pop()
        if top not in out:
            out.add(top)
            pending += top.all_input_nodes
    return out


def _cone(program: Program, choice: Node) -> dict[Node, None]:
    """What is computed of a choice by operators that can be read, up to the next router, in order."""
    cone: dict[Node, None] = {choice: None}
    known = HANDLERS.keys() | MOVES.keys()
    for node in program.nodes():
        if node.op != "call_function" or not any(a in cone for a in node.all_input_nodes):
            continue
        if is_choice(node):
            break
        if node.target in known:
            cone[node] = None
    return cone


def _may_combine(program: Program, node: Node, cone: dict[Node, None]) -> bool:
    """A float value [.., R, D] that is not one of many to be added up with others of the cone."""
    val = node.meta.get("val")
    if node.target not in COMBINES or not isinstance(val, torch.Tensor):
        return False
    if val.dim() < 2 or not val.is_floating_point() or not is_static(val.shape[-1]):
        return False
    if int(val.shape[-1]) == 1 or sum(not is_static(d) for d in val.shape) != 1:
        return False
    for user in node.users:
        if user.target in (aten.add.Tensor, aten.where.self, aten.stack.default, aten.cat.default):
            others = [a for a in user.all_input_nodes if a is not node and a in cone]
            if others:
                return False
    return True


def _rewrite(program: Program, root: Node, found: Mixture) -> None:
    router, experts = found.router, found.experts
    routed = insert(program, root, operators.ROUTE, *_route_arguments(program, root, router))
    note(routed, role="route")
    weights, chosen = item(program, root, routed, 0), item(program, root, routed, 1)
    x = experts[0].x.node
    rows = insert(program, root, VIEW, x, [-1, int(value(x).shape[-1])])
    gate_up = _weight(program, [(e.gate, e.up) for e in experts], "gate_up")
    down = _weight(program, [(e.down,) for e in experts], "down")
    biases = _biases(program, experts)
    out = insert(
        program,
        root,
        operators.MOE_FFN,
        *(rows, weights, chosen, gate_up, down, *biases, experts[0].activation),
    )
    note(out, role="moe_ffn")
    shape = [int(d) if is_static(d) else -1 for d in value(root).shape]
    back = insert(program, root, VIEW, out, shape)
    if value(back).dtype != value(root).dtype:
        back = insert(program, root, aten.to.dtype, back, value(root).dtype)
    for other in found.rest:
        back = insert(program, root, aten.add.Tensor, back, other)
    root.replace_all_uses_with(back)
    program.graph.erase_node(root)


def _route_arguments(program: Program, root: Node, router: Router) -> tuple[object, ...]:
    size = int(value(router.logits).shape[-1])
    logits = insert(program, root, VIEW, router.logits, [-1, size])
    if value(logits).dtype != torch.float32:
        logits = insert(program, root, aten.to.dtype, logits, torch.float32)
    bias = router.bias
    if bias is not None and value(bias).dtype != torch.float32:
        bias = insert(program, root, aten.to.dtype, bias, torch.float32)
    chosen = router.top_k, router.score, router.groups, router.kept_groups
    return logits, bias, *chosen, router.renormalize, router.scale


def _biases(program: Program, experts: Sequence[Expert]) -> tuple[Node | None, Node | None]:
    first = experts[0]
    inner = outer = None
    if first.gate_bias is not None:
        pairs = [(e.gate_bias, e.up_bias) for e in experts]
        inner = _weight(program, pairs, "gate_up_bias")  # type: ignore[arg-type]
    if first.down_bias is not None:
        outer = _weight(program, [(e.down_bias,) for e in experts], "down_bias")  # type: ignore
    return inner, outer


def _weight(program: Program, views: Sequence[Sequence[View]], name: str) -> Node:
    """The experts' weights as one input [E, rows, ..]; the model's own where it is that already."""
    made = stacked(program, views)
    if isinstance(made, Node):
        return made
    first = views[0][0]
    rows = sum(v.rows for v in views[0])
    like = value(first.node)
    tail = [] if first.is_vector() else [int(like.shape[-2 if first.turned else -1])]
    with fake_mode(program):
        val = torch.empty((len(views), rows, *tail), dtype=like.dtype)
    base = first.node.name.removesuffix("_weight")
    return add_weight(program, f"{base}_{name}", made, val)


def _remark_dense(program: Program, claimed: set[Node]) -> None:
    """Products with stacked weights that no choice accounts for."""
    live = _ancestors(program.result())
    for node in program.calls(aten.einsum.default, aten.bmm.default, aten.matmul.default):
        stack = [a for a in node.all_input_nodes if a.name in program.recipes]
        if node in claimed or node not in live or not any(value(a).dim() == 3 for a in stack):
            continue
        where = facts(node).origin or node.name
        if any(r.where == where and r.pass_name == "fuse_moe" for r in program.remarks):
            continue
        why = "experts with stacked weights, but their gate is not the top k of a router"
        program.remarks.append(Remark("fuse_moe", where, why))
