"""Which kernel of the CPU library computes an operator, and with what arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from dcompile.codegen.launches import (
    Argument,
    Float,
    Int,
    Launch,
    Value,
    all_outputs,
    outputs,
    strided,
    unread_output,
)
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.sizes import Size, elements, shape_of

aten = torch.ops.aten
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

Selector = Callable[[Program, Node], Launch | None]


def select(program: Program, node: Node) -> Launch | None:
    """The library launch that computes `node`; None where the library has no kernel for it."""
    selector = TABLE.get(node.target)
    return selector(program, node) if selector is not None else None


def is_weight(program: Program, node: object) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and program.input(node.name).kind == "weight"
    )


def rows_of(program: Program, x: Node, inner: int = 1) -> Int:
    """How many rows a value has when its last `inner` axes are one row."""
    shape = shape_of(value(x), program.symbols)
    return Int(elements(shape[: len(shape) - inner]))


def last(x: Node) -> Int:
    return Int(int(value(x).shape[-1]))


def optional(node: object) -> Value:
    return Value(node if isinstance(node, Node) else None)


def _native(kernel: str, node: Node, args: list[Argument], writes: list[Node | None]) -> Launch:
    present = [w for w in writes if w is not None]
    return Launch("native", kernel, node, args, writes=present, covers=[node])


def _suffix(*nodes: object) -> str | None:
    dtypes = {value(n).dtype for n in nodes if isinstance(n, Node)}
    return SUFFIX.get(dtypes.pop()) if len(dtypes) == 1 else None


def _embedding(program: Program, node: Node) -> Launch | None:
    table, ids = node.args[:2]
    end = _suffix(table)
    if end is None or not isinstance(ids, Node) or not is_weight(program, table):
        return None
    if value(ids).dtype != torch.int64:
        return None
    args: list[Argument] = [Value(node), optional(table), Value(ids)]
    return _native(f"embedding_{end}", node, [*args, rows_of(program, ids, 0), last(node)], [node])


def _rms_norm(program: Program, node: Node) -> Launch | None:
    x, shape, weight, eps = (*node.args, None, None)[:4]
    end = _suffix(x, weight)
    assert isinstance(x, Node)
    if end is None or len(shape) != 1 or eps is None:  # type: ignore[arg-type]
        return None
    args: list[Argument] = [Value(node), Value(x), optional(weight)]
    tail: list[Argument] = [rows_of(program, x), last(x), Float(float(eps))]  # type: ignore[arg-type]
    return _native(f"rms_norm_{end}", node, args + tail, [node])


def _add_rms_norm(program: Program, node: Node) -> Launch | None:
    x, r, weight, eps = node.args
    end = _suffix(x, r, weight)
    if end is None:
        return None
    assert isinstance(x, Node) and isinstance(r, Node) and isinstance(eps, float)
    total, normed = outputs(node, 2)
    if total is None or normed is None:
        # The kernel writes both; an unread sum gets a place all the same.
        total = total or unread_output(program, node, 0)
        normed = normed or unread_output(program, node, 1)
    args: list[Argument] = [Value(total), Value(normed), Value(x), Value(r), optional(weight)]
    tail: list[Argument] = [rows_of(program, x), last(x), Float(eps)]
    return _native(f"add_rms_norm_{end}", node, args + tail, [total, normed])


def _linear(program: Program, node: Node) -> Launch | None:
    x, weight, bias = (*node.args, None)[:3]
    end = _suffix(x, weight, bias)
    if end is None or not is_weight(program, weight):
        return None
    assert isinstance(x, Node) and isinstance(weight, Node)
    args: list[Argument] = [Value(node), Value(x), Value(weight, layout="packed"), optional(bias)]
    args += [Value(None), rows_of(program, x), last(node), last(x)]
    return _native(f"linear_{end}", node, args, [node])


def _silu_mul(program: Program, node: Node) -> Launch | None:
    gate, up = node.args
    end = _suffix(gate, up)
    if end is None:
        return None
    assert isinstance(gate, Node) and isinstance(up, Node)
    (g, g_at, g_stride), (u, u_at, u_stride) = strided(gate), strided(up)
    args: list[Argument] = [Value(node), Value(g, g_at), Value(u, u_at)]
    tail: list[Argument] = [rows_of(program, node), last(node), Int(g_stride), Int(u_stride)]
    return _native(f"silu_mul_{end}", node, args + tail, [node])


def _norm_rope_write(program: Program, node: Node) -> Launch | None:
    qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads, eps = node.args
    end = _suffix(qkv, q_norm, k_norm, keys)
    if end is None:
        return None
    assert isinstance(keys, Node) and isinstance(row_seq, Node) and isinstance(cos, Node)
    assert isinstance(values, Node) and isinstance(heads, int) and isinstance(eps, float)
    q, *_ = all_outputs(program, node, 3)
    _, positions, groups, size = (int(d) for d in value(keys).shape)
    args: list[Argument] = [Value(q), Value(keys), Value(values)]
    args += [optional(a) for a in (qkv, q_norm, k_norm, cos, sin, row_seq, row_pos)]
    args += [rows_of(program, row_seq, 0), Int(heads), Int(groups), Int(size), Int(positions)]
    args += [Int(int(value(cos).shape[-1])), Float(eps)]
    launch = _native(f"norm_rope_write_{end}", node, args, [q])
    launch.updates = [keys, values]
    return launch


def _attend(program: Program, node: Node) -> Launch | None:
    q, keys, values, row_seq, row_limit, scale = node.args
    end = _suffix(q, keys, values)
    if end is None:
        return None
    assert isinstance(q, Node) and isinstance(keys, Node) and isinstance(scale, float)
    _, positions, groups, size = (int(d) for d in value(keys).shape)
    args: list[Argument] = [Value(node), *(optional(a) for a in (q, keys, values))]
    args += [optional(row_seq), optional(row_limit), rows_of(program, q, 2)]
    args += [Int(int(value(q).shape[1])), Int(groups), Int(size), Int(positions), Float(scale)]
    return _native(f"attend_{end}", node, args, [node])


def _route(program: Program, node: Node) -> Launch | None:
    logits, bias, top_k, score, groups, kept, renormalize, scale = node.args
    assert isinstance(logits, Node) and isinstance(top_k, int) and isinstance(scale, float)
    if value(logits).dtype != torch.float32:
        return None
    weights, experts = all_outputs(program, node, 2)
    args: list[Argument] = [Value(weights), Value(experts), Value(logits), optional(bias)]
    args += [
        rows_of(program, logits),
        last(logits),
        Int(top_k),
        Int(operators.SCORES.index(str(score))),
    ]
    args += [Int(int(groups)), Int(int(kept)), Int(int(bool(renormalize))), Float(scale)]  # type: ignore[call-overload]
    return _native("route", node, args, [weights, experts])


def _route_limited(program: Program, node: Node) -> Launch | None:
    logits, bias, *places, top_k, score, groups, kept, renormalize = node.args[:11]
    scale, capacity, reroute, pool = node.args[11:]
    assert isinstance(logits, Node) and isinstance(top_k, int) and isinstance(scale, float)
    assert isinstance(capacity, float)
    if value(logits).dtype != torch.float32:
        return None
    weights, experts = all_outputs(program, node, 2)
    args: list[Argument] = [Value(weights), Value(experts), Value(logits), optional(bias)]
    args += [optional(place) for place in places]
    args += [rows_of(program, logits), rows_of(program, places[2], 0), last(logits)]  # type: ignore[arg-type]
    args += [Int(top_k), Int(operators.SCORES.index(str(score)))]
    args += [Int(int(groups)), Int(int(kept)), Int(int(bool(renormalize))), Float(scale)]  # type: ignore[call-overload]
    args += [Float(capacity), Int(int(bool(reroute))), Int(int(pool)), last(places[3])]  # type: ignore
    return _native("route_limited", node, args, [weights, experts])


def _moe_ffn(program: Program, node: Node) -> Launch | None:
    x, weights, experts, gate_up, down, gate_up_bias, down_bias, activation = node.args
    end = _suffix(x, gate_up, down)
    if end is None or not is_weight(program, gate_up) or not is_weight(program, down):
        return None
    assert isinstance(x, Node) and isinstance(weights, Node) and isinstance(experts, Node)
    assert isinstance(gate_up, Node) and isinstance(down, Node) and isinstance(activation, str)
    args: list[Argument] = [Value(node), Value(x), Value(weights), Value(experts)]
    args += [Value(gate_up, layout="experts"), Value(down, layout="experts")]
    args += [optional(gate_up_bias), optional(down_bias)]
    args += [rows_of(program, x), last(x), last(down), Int(int(value(down).shape[0]))]
    args += [last(weights), Int(tuple(operators.ACTIVATIONS).index(activation))]
    return _native(f"moe_ffn_{end}", node, args, [node])


def _vocab_choice(program: Program, node: Node) -> Launch | None:
    x, weight, bias, live, temperature, seed, tick, pos, *asked, mask_id = node.args
    end = _suffix(x, weight, bias)
    if end is None or not is_weight(program, weight):
        return None
    assert isinstance(x, Node) and isinstance(weight, Node) and isinstance(temperature, Node)
    assert isinstance(mask_id, int)
    found = all_outputs(program, node, 7 if asked else 4)
    args: list[Argument] = [*(Value(f) for f in found), Value(x), Value(weight, layout="packed")]
    args += [optional(a) for a in (bias, live, temperature, seed, tick, pos, *asked)]
    args += [rows_of(program, x), rows_of(program, temperature, 0)]
    args += [Int(int(value(weight).shape[0])), last(x), Int(mask_id)]
    args += [last(a) for a in asked]  # type: ignore[arg-type]
    kernel = "vocab_choice_asked" if asked else "vocab_choice"
    return _native(f"{kernel}_{end}", node, args, list(found))


def _vocab_soft_embed(program: Program, node: Node) -> Launch | None:
    x, head, bias, table, live, weight = node.args
    end = _suffix(x, head, bias, table)
    if end is None or not is_weight(program, head) or not is_weight(program, table):
        return None
    assert isinstance(x, Node) and isinstance(head, Node) and isinstance(table, Node)
    args: list[Argument] = [Value(node), Value(x), Value(head, layout="packed"), optional(bias)]
    args += [Value(table), optional(live), optional(weight), rows_of(program, x)]
    args += [Int(int(value(head).shape[0])), last(x), last(table), Int(int(value(table).shape[0]))]
    return _native(f"soft_embed_{end}", node, args, [node])


def _gather(program: Program, node: Node) -> Launch | None:
    """Rows of the first axis that is not 1, by one index: index_select, or index of a constant."""
    if node.target is aten.index_select.default:
        x, axis, index = node.args
    else:
        x, (index, *rest) = node.args  # type: ignore[misc]
        axis = 0
        if rest or index is None:
            return None
    assert isinstance(x, Node) and isinstance(index, Node) and isinstance(axis, int)
    if value(index).dtype != torch.int64 or any(d != 1 for d in value(x).shape[:axis]):
        return None
    row: list[Size] = [int(d) for d in value(x).shape[axis + 1 :]]
    size = elements([*row, value(x).element_size()])
    args: list[Argument] = [
        Value(node),
        Value(x),
        Value(index),
        rows_of(program, index, 0),
        Int(size),
    ]
    return _native("gather_rows", node, args, [node])


TABLE: dict[object, Selector] = {
    aten.embedding.default: _embedding,
    aten.rms_norm.default: _rms_norm,
    aten.linear.default: _linear,
    aten.index_select.default: _gather,
    aten.index.Tensor: _gather,
    operators.ADD_RMS_NORM: _add_rms_norm,
    operators.SILU_MUL: _silu_mul,
    operators.NORM_ROPE_WRITE: _norm_rope_write,
    operators.ATTEND: _attend,
    operators.ROUTE: _route,
    operators.ROUTE_LIMITED: _route_limited,
    operators.MOE_FFN: _moe_ffn,
    operators.VOCAB_SOFT_EMBED: _vocab_soft_embed,
    operators.VOCAB_CHOICE: _vocab_choice,
    operators.VOCAB_CHOICE_ASKED: _vocab_choice,
}
_LOGITS = "a kernel computes it together with the linear layer whose output the logits must be"
# How each of the others is computed.
WITHOUT_KERNEL: Mapping[object, str] = {
    operators.WRITE_ROWS: "it is printed where it writes into a state of the step",
    operators.CHOOSE: f"{_LOGITS}: vocab_choice, of fuse_vocab_choice",
    operators.CHOOSE_ASKED: f"{_LOGITS}: vocab_choice_asked, of fuse_vocab_choice",
    operators.SOFT_EMBED: f"{_LOGITS}: vocab_soft_embed, of fuse_soft_embed",
}
