"""Random edits of a traced step: from one trace, many programs whose values differ and whose shapes do not."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from dcompile.driver.pipeline import clean_up
from dcompile.ir import operators
from dcompile.ir.meta import facts
from dcompile.ir.program import Program

aten = torch.ops.aten
_UNARY = "silu gelu relu sigmoid tanh neg abs cos sin"
UNARY = tuple(getattr(aten, name).default for name in _UNARY.split())
BINARY = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
EPS = {aten.rms_norm.default: 3, aten.layer_norm.default: 4}


def copied(program: Program) -> Program:
    """The same program over a graph of its own."""
    graph, swap = Graph(), {}
    for node in program.graph.nodes:
        swap[node] = graph.node_copy(node, lambda n: swap[n])
        swap[node].meta = dict(node.meta)
    module = GraphModule(torch.nn.Module(), graph)
    return replace(
        program,
        module=module,
        inputs=list(program.inputs),
        outputs=list(program.outputs),
        recipes=dict(program.recipes),
        constants=dict(program.constants),
        remarks=[],
        known={},
    )


def edit(program: Program, seed: int) -> str:
    """Change one to three places of the model's part; says what. Shapes and dtypes stay as they were."""
    rng = random.Random(seed)
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        nodes = [n for n in program.nodes() if _is_models(n)]
        rng.shuffle(nodes)
        for node in nodes:
            what = _change(program, node, rng)
            if what:
                done.append(f"{node.name}: {what}")
                break
    clean_up(program)
    return "; ".join(done)


def _is_models(node: Node) -> bool:
    held = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    return held and bool(facts(node).origin) and node.target is not operators.CHOOSE


def _change(program: Program, node: Node, rng: random.Random) -> str:
    changes = [_rewire]
    if node.target in UNARY:
        changes.append(_other_unary)
    if node.target in BINARY:
        changes += [_other_binary, _swap, _scalar]
    if node.target in EPS:
        changes += [_epsilon, _epsilon]
    if node.target is aten.cat.default:
        changes.append(_reverse)
    if node.target is aten.slice.Tensor:
        changes.append(_shift)
    if node.target is aten.scaled_dot_product_attention.default:
        changes.append(_scale)
    for topk in node.all_input_nodes:
        if topk.target is aten.topk.default:
            changes.append(lambda program, node, rng, topk=topk: _smallest(topk))
    return rng.choice(changes)(program, node, rng)


def _like(a: object, b: object) -> bool:
    values = [n.meta.get("val") if isinstance(n, Node) else None for n in (a, b)]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return False
    first, second = values
    return first.dtype == second.dtype and str(tuple(first.shape)) == str(tuple(second.shape))


def _rewire(program: Program, node: Node, rng: random.Random) -> str:
    """Read another value of the same shape and dtype that is computed before."""
    inputs = [n for n in node.all_input_nodes if n.op == "call_function" and facts(n).origin]
    if not inputs:
        return ""
    old = rng.choice(inputs)
    before = []
    for other in program.graph.nodes:
        if other is node:
            break
        if (
            other is not old
            and other.op == "call_function"
            and facts(other).origin
            and _like(other, old)
        ):
            before.append(other)
    if not before:
        return ""
    new = rng.choice(before)
    node.replace_input_with(old, new)
    return f"reads {new.name} for {old.name}"


def _other_unary(program: Program, node: Node, rng: random.Random) -> str:
    node.target = rng.choice([t for t in UNARY if t is not node.target])
    node.args, node.kwargs = node.args[:1], {}
    return str(node.target)


def _other_binary(program: Program, node: Node, rng: random.Random) -> str:
    if node.kwargs:
        return ""
    # A quotient of whole numbers would be of another dtype.
    if not node.meta["val"].is_floating_point():
        return ""
    node.target = rng.choice([t for t in BINARY[:3] if t is not node.target])
    return str(node.target)


def _swap(program: Program, node: Node, rng: random.Random) -> str:
    if not _like(node.args[0], node.args[1]):
        return ""
    node.args = (node.args[1], node.args[0], *node.args[2:])
    return "operands swapped"


def _scalar(program: Program, node: Node, rng: random.Random) -> str:
    if not isinstance(node.args[1], (int, float)) or not node.meta["val"].is_floating_point():
        return ""
    node.args = (
        node.args[0],
        node.args[1] * rng.choice([0.5, 2.0, -1.0]) + rng.choice([0.0, 0.125]),
    )
    return f"with {node.args[1]}"


def _epsilon(program: Program, node: Node, rng: random.Random) -> str:
    at = EPS[node.target]
    if len(node.args) <= at:
        return ""
    args = list(node.args)
    args[at] = rng.choice([1e-6, 1e-4, 0.01, 0.5])
    node.args = tuple(args)
    return f"epsilon {args[at]}"


def _reverse(program: Program, node: Node, rng: random.Random) -> str:
    parts = list(node.args[0])
    if len(parts) < 2 or not all(_like(parts[0], part) for part in parts[1:]):
        return ""
    node.args = (parts[::-1], *node.args[1:])
    return "parts reversed"


def _shift(program: Program, node: Node, rng: random.Random) -> str:
    if len(node.args) != 4:
        return ""
    x, dim, start, end = node.args
    size = x.meta["val"].shape[dim]
    if not all(isinstance(n, int) for n in (start, end, size)) or not end < size:
        return ""
    node.args = (x, dim, start + 1, end + 1)
    return "one further"


def _scale(program: Program, node: Node, rng: random.Random) -> str:
    node.kwargs = {**node.kwargs, "scale": rng.choice([0.25, 0.7, 1.0])}
    return f"scale {node.kwargs['scale']}"


def _smallest(topk: Node) -> str:
    largest = topk.args[3] if len(topk.args) > 3 else True
    topk.args = (*topk.args[:2], -1, not largest)
    return f"{topk.name} largest={not largest}"
