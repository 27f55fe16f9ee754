"""router, top-k, all experts, weighted sum  ->  route + moe_ffn, which reads only chosen experts"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from dcompile.ir import ops
from dcompile.ir.edit import add_weight, fake_mode, insert, item, replace, through, value
from dcompile.ir.meta import facts, note
from dcompile.ir.program import Exactness, Program, Remark
from dcompile.ir.weights import Concat, Recipe, Stack

aten = torch.ops.aten
EINSUM = aten.einsum.default
VIEW, CAST = aten.reshape.default, aten._to_copy.default


@dataclass(frozen=True)
class Router:
    """What `route` needs to know; `logits` [1, R, E]."""

    logits: Node
    bias: Node | None
    top_k: int
    score: str
    groups: int
    kept_groups: int
    renormalize: bool
    scale: float


@dataclass(frozen=True)
class FuseMoE:
    """Recognise a dense mixture of stacked experts whose gate is zero for all but the top k."""

    exactness = Exactness.ROUNDING

    def __call__(self, program: Program) -> int:
        sites = [n for n in program.calls(EINSUM) if _is_combine(n)]
        return sum(_fuse(program, node) for node in sites)


def _is_combine(node: Node) -> bool:
    """btef,edf,bte->btd in any letters"""
    terms, _, out = str(node.args[0]).replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(parts) != 3 or [len(p) for p in parts] != [4, 3, 3] or len(out) != 3:
        return False
    (b, t, e, f), down, gate = parts[0], parts[1], parts[2]
    d = out[2]
    return (down, gate, out) == (f"{e}{d}{f}", f"{b}{t}{e}", f"{b}{t}{d}")


def _leave(program: Program, node: Node, why: str) -> int:
    program.remarks.append(Remark("fuse_moe", facts(node).origin or node.name, why))
    return 0


def _fuse(program: Program, node: Node) -> int:
    hidden, down, gate = node.args[1]  # type: ignore[misc]
    experts = _experts(hidden)
    if experts is None or down.op != "placeholder":
        return _leave(
            program, node, "the experts are not silu(x gate) * (x up) with stacked weights"
        )
    router = _router(gate)
    if router is None:
        return _leave(program, node, "the gate is not the top k of a softmax or sigmoid")
    x, gate_weight, up_weight = experts
    size, top_k = int(value(x).shape[-1]), router.top_k
    logits = insert(program, node, VIEW, router.logits, [-1, int(value(router.logits).shape[-1])])
    if value(logits).dtype != torch.float32:
        logits = insert(program, node, aten.to.dtype, logits, torch.float32)
    routed = insert(
        program,
        node,
        ops.ROUTE,
        *(logits, router.bias, top_k, router.score, router.groups, router.kept_groups),
        *(router.renormalize, router.scale),
    )
    note(routed, role="route")
    weights, chosen = item(program, node, routed, 0), item(program, node, routed, 1)
    rows = insert(program, node, VIEW, x, [-1, size])
    merged = _gate_up(program, node, gate_weight, up_weight)
    out = insert(
        program, node, ops.MOE_FFN, rows, weights, chosen, merged, down, None, None, "silu"
    )
    note(out, role="moe_ffn")
    replace(program, node, VIEW, out, [1, -1, size])
    return 1


def _experts(hidden: Node) -> tuple[Node, Node, Node] | None:
    """(x, gate [E, F, D], up [E, F, D]) of silu(einsum(x, gate)) * einsum(x, up)"""
    if hidden.target is not aten.mul.Tensor:
        return None
    for silu, up in (hidden.args, hidden.args[::-1]):
        if not (isinstance(silu, Node) and silu.target is aten.silu.default):
            continue
        first, second = _project(silu.args[0]), _project(up)
        if first is not None and second is not None and first[0] is second[0]:
            return first[0], first[1], second[1]
    return None


def _project(node: object) -> tuple[Node, Node] | None:
    """(x, w) of btd,efd->btef"""
    if not (isinstance(node, Node) and node.target is EINSUM):
        return None
    terms, _, out = str(node.args[0]).replace(" ", "").partition("->")
    x, w = [*terms.split(","), ""][:2]
    if len(x) != 3 or len(w) != 3 or w[2] != x[2] or out != x[:2] + w[:2]:
        return None
    a, b = node.args[1]  # type: ignore[misc]
    return (a, b) if b.op == "placeholder" else None


def _gate_up(program: Program, node: Node, gate: Node, up: Node) -> Node:
    a, b = program.recipes[gate.name], program.recipes[up.name]
    recipe: Recipe = Concat((a, b), dim=1)
    if isinstance(a, Stack) and isinstance(b, Stack) and len(a.parts) == len(b.parts):
        # Expert by expert, so that no two whole copies are ever held.
        recipe = Stack(tuple(Concat(pair) for pair in zip(a.parts, b.parts, strict=True)))
    with fake_mode(program):
        like = torch.cat((value(gate), value(up)), 1)
    return add_weight(program, f"{gate.name}_up", recipe, like)


def _router(gate: Node) -> Router | None:
    """Match  scatter(zeros, experts, [scale] [renormalise] weights)."""
    scatter = through(gate, CAST)
    if scatter is None or scatter.target is not aten.scatter.src:
        return None
    zeros, _, experts, weights = scatter.args
    if not isinstance(zeros, Node) or zeros.target is not aten.zeros_like.default:
        return None
    assert isinstance(weights, Node)
    scale, renormalize = 1.0, False
    if weights.target is aten.mul.Tensor and isinstance(weights.args[1], (int, float)):
        scale = float(weights.args[1])
        weights = weights.args[0]  # type: ignore[assignment]
    if weights.target is aten.div.Tensor:
        if not _is_sum(weights.args[1], weights.args[0]):
            return None
        renormalize = True
        weights = weights.args[0]  # type: ignore[assignment]
    chosen = _chosen(weights, experts)
    if chosen is None:
        return None
    scores, ranked, top_k = chosen
    bias, groups, kept = None, 1, 1
    if ranked is not scores:
        found = _biased(ranked, scores)
        if found is None:
            return None
        bias, groups, kept = found
    kind = _score(scores)
    if kind is None:
        return None
    return Router(kind[1], bias, top_k, kind[0], groups, kept, renormalize, scale)


def _is_sum(node: object, x: object) -> bool:
    """sum(x, -1, keepdim) [+ 1e-20]"""
    if isinstance(node, Node) and node.target is aten.add.Tensor and node.args[1] == 1e-20:
        node = node.args[0]
    return isinstance(node, Node) and node.target is aten.sum.dim_IntList and node.args[0] is x


def _chosen(weights: Node, experts: object) -> tuple[Node, Node, int] | None:
    """(scores, what was ranked, k): weights are topk's values, or scores gathered at its indices."""
    if not (isinstance(experts, Node) and experts.target is operator.getitem):
        return None
    topk, which = experts.args
    if not (isinstance(topk, Node) and topk.target is aten.topk.default and which == 1):
        return None
    ranked, k = topk.args[:2]
    assert isinstance(ranked, Node) and isinstance(k, int)
    if weights.target is operator.getitem and weights.args == (topk, 0):
        return ranked, ranked, k
    if weights.target is aten.gather.default and weights.args[2] is experts:
        scores = weights.args[0]
        assert isinstance(scores, Node)
        return scores, ranked, k
    return None


def _biased(ranked: Node, scores: Node) -> tuple[Node | None, int, int] | None:
    """(bias, groups, kept groups) of what was ranked."""
    groups = kept = 1
    masked = through(ranked, VIEW)
    if masked is not None and masked.target is aten.masked_fill.Scalar:
        grouped, outside = masked.args[:2]
        assert isinstance(grouped, Node) and isinstance(outside, Node)
        groups = int(value(grouped).shape[-2])
        found = _kept(outside, grouped)
        if found is None:
            return None
        kept = found
        ranked = through(grouped, VIEW)  # type: ignore[assignment]
    if ranked is scores:
        return None, groups, kept
    if ranked.target is aten.add.Tensor and ranked.args[0] is scores:
        bias = ranked.args[1]
        if isinstance(bias, Node) and bias.op == "placeholder":
            return bias, groups, kept
    return None


def _kept(outside: Node, grouped: Node) -> int | None:
    """k of: not among the k groups whose two best scores have the greatest sums"""
    if outside.target is not aten.eq.Scalar or outside.args[1] != 0:
        return None
    kept = through(outside.args[0], VIEW)
    if kept is None or kept.target not in (aten.scatter.value, aten.scatter.src):
        return None
    best = kept.args[2]
    if not (isinstance(best, Node) and best.target is operator.getitem and best.args[1] == 1):
        return None
    topk = best.args[0]
    sums, k = topk.args[:2]  # type: ignore[union-attr]
    if sums.target is not aten.sum.dim_IntList:
        return None
    two = sums.args[0].args[0]
    if two.target is not aten.topk.default or two.args[0] is not grouped or two.args[1] != 2:
        return None
    return int(k)


def _score(scores: Node) -> tuple[str, Node] | None:
    if scores.target is aten.softmax.int and scores.args[1] in (-1, value(scores).dim() - 1):
        logits = through(scores.args[0], CAST)
        return None if logits is None else ("softmax", logits)
    if scores.target is aten.sigmoid.default:
        logits = scores.args[0]
        assert isinstance(logits, Node)
        return "sigmoid", logits
    return None
