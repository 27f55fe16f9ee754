"""dcompile's fused operators as ONNX functions of the domain `dcompile`, each with its reference body.

The bodies follow those of `ir/operators/`, in standard operators of opset 18.  Axes as there: R rows, N sequences,
L positions a sequence, D hidden, H query heads, G key heads, K head size, E experts, k of them a row.  The rows
of a sequence stand together and each sequence has as many, so that attention is one product a sequence.
"""

# mypy: ignore-errors
# ruff: noqa: E501

from __future__ import annotations

import onnx
from onnxscript import opset18 as op
from onnxscript import script, values

DOMAIN = "dcompile"
VERSION = 1
_opset = values.Opset(DOMAIN, VERSION)


@script(_opset, default_opset=op)
def rms_normalize(x, eps: float):
    """x / sqrt(mean(x^2) + eps) along the last axis, in float32."""
    wide = op.Cast(x, to=1)
    mean = op.ReduceMean(wide * wide, op.Constant(value_ints=[-1]), keepdims=1)
    return op.CastLike(wide / op.Sqrt(mean + eps), x)


@script(_opset, default_opset=op)
def rms_norm(x, weight, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight along the last axis, in float32, rounded once."""
    wide = op.Cast(x, to=1)
    mean = op.ReduceMean(wide * wide, op.Constant(value_ints=[-1]), keepdims=1)
    return op.CastLike(wide / op.Sqrt(mean + eps) * op.Cast(weight, to=1), x)


@script(_opset, default_opset=op)
def add_rms_norm(x, r, weight, eps: float):
    """(x + r, rms_norm(x + r))"""
    total = x + r
    normal = rms_norm(total, weight, eps=eps)
    return total, normal


@script(_opset, default_opset=op)
def add_rms_normalize(x, r, eps: float):
    """(x + r, rms_normalize(x + r))"""
    total = x + r
    normal = rms_normalize(total, eps=eps)
    return total, normal


@script(_opset, default_opset=op)
def silu_mul(gate, up):
    """silu(gate) * up"""
    wide = op.Cast(gate, to=1)
    return op.CastLike(wide * op.Sigmoid(wide), gate) * up


@script(_opset, default_opset=op)
def rotate(x, cos, sin):
    """Turn the first rot of x [R, H, K] by cos, sin [R, rot], halves paired (RoFormer, half split)."""
    two = op.Constant(value_ints=[2])
    zero = op.Constant(value_ints=[0])
    rot = op.Shape(cos, start=1)
    head = op.Cast(op.Slice(x, zero, rot, two), to=1)
    tail = op.Slice(x, rot, op.Shape(x, start=2), two)
    half = rot / two
    a = op.Slice(head, zero, half, two)
    b = op.Slice(head, half, rot, two)
    one = op.Constant(value_ints=[1])
    turned = head * op.Unsqueeze(cos, one) + op.Concat(-b, a, axis=2) * op.Unsqueeze(sin, one)
    return op.Concat(op.CastLike(turned, x), tail, axis=2)


@script(_opset, default_opset=op)
def write_rows(cache, rows, row_seq, row_pos):
    """cache [N, L, G, K] with rows [R, G, K] at [row_seq, row_pos]"""
    one = op.Constant(value_ints=[1])
    place = op.Concat(op.Unsqueeze(row_seq, one), op.Unsqueeze(row_pos, one), axis=1)
    return op.ScatterND(cache, place, rows)


@script(_opset, default_opset=op)
def split_heads(qkv, keys, heads: int):
    """qkv [R, (H + 2 G) K] -> q [R, H, K], k and v [R, G, K]"""
    groups = op.Shape(keys, start=2, end=3)
    count = op.Constant(value_int=heads)
    one = op.Constant(value_ints=[1])
    h = op.Reshape(count, one)
    rows = op.Reshape(
        qkv,
        op.Concat(
            op.Constant(value_ints=[-1]), h + groups + groups, op.Shape(keys, start=3), axis=0
        ),
    )
    q = op.Slice(rows, op.Constant(value_ints=[0]), h, one)
    k = op.Slice(rows, h, h + groups, one)
    v = op.Slice(rows, h + groups, h + groups + groups, one)
    return q, k, v


@script(_opset, default_opset=op)
def rope_write(q, k, v, cos, sin, row_seq, row_pos, keys, values):
    """q and k turned by the tables' rows, k and v written at their places."""
    c = op.Gather(cos, row_pos)
    s = op.Gather(sin, row_pos)
    turned = rotate(q, c, s)
    new_keys = write_rows(keys, rotate(k, c, s), row_seq, row_pos)
    new_values = write_rows(values, v, row_seq, row_pos)
    return turned, new_keys, new_values


@script(_opset, default_opset=op)
def norm_rope_write(
    qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads: int, eps: float
):
    """Per-head norm of q and k, rotary embedding, key and value rows written at their places."""
    q, k, v = split_heads(qkv, keys, heads=heads)
    q = rms_norm(q, q_norm, eps=eps)
    k = rms_norm(k, k_norm, eps=eps)
    turned, new_keys, new_values = rope_write(q, k, v, cos, sin, row_seq, row_pos, keys, values)
    return turned, new_keys, new_values


@script(_opset, default_opset=op)
def q_norm_rope_write(
    qkv, q_norm, cos, sin, row_seq, row_pos, keys, values, heads: int, eps: float
):
    """norm_rope_write of a model that normalises q only"""
    q, k, v = split_heads(qkv, keys, heads=heads)
    q = rms_norm(q, q_norm, eps=eps)
    turned, new_keys, new_values = rope_write(q, k, v, cos, sin, row_seq, row_pos, keys, values)
    return turned, new_keys, new_values


@script(_opset, default_opset=op)
def k_norm_rope_write(
    qkv, k_norm, cos, sin, row_seq, row_pos, keys, values, heads: int, eps: float
):
    """norm_rope_write of a model that normalises k only"""
    q, k, v = split_heads(qkv, keys, heads=heads)
    k = rms_norm(k, k_norm, eps=eps)
    turned, new_keys, new_values = rope_write(q, k, v, cos, sin, row_seq, row_pos, keys, values)
    return turned, new_keys, new_values


@script(_opset, default_opset=op)
def plain_rope_write(qkv, cos, sin, row_seq, row_pos, keys, values, heads: int):
    """norm_rope_write of a model without norms of q and k"""
    q, k, v = split_heads(qkv, keys, heads=heads)
    turned, new_keys, new_values = rope_write(q, k, v, cos, sin, row_seq, row_pos, keys, values)
    return turned, new_keys, new_values


@script(_opset, default_opset=op)
def attend(q, keys, values, row_limit, scale: float):
    """q [R, H, K] attends to the first row_limit[r] keys of its sequence -> [R, H, K]; float32 inside."""
    minus = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    batch = op.Shape(keys, start=0, end=1)
    length = op.Shape(keys, start=1, end=2)
    groups = op.Shape(keys, start=2, end=3)
    size = op.Shape(keys, start=3)
    heads = op.Shape(q, start=1, end=2)
    shape = op.Concat(batch, minus, groups, heads / groups, size, axis=0)
    # [N, G, H / G, W, K]
    asked = op.Transpose(op.Reshape(op.Cast(q, to=1), shape), perm=[0, 2, 3, 1, 4])
    two = op.Constant(value_ints=[2])
    k = op.Unsqueeze(op.Transpose(op.Cast(keys, to=1), perm=[0, 2, 3, 1]), two)
    v = op.Unsqueeze(op.Transpose(op.Cast(values, to=1), perm=[0, 2, 1, 3]), two)
    scores = op.MatMul(asked, k) * scale
    limit = op.Reshape(row_limit, op.Concat(batch, one, one, minus, one, axis=0))
    place = op.Range(
        op.Constant(value_int=0),
        op.Squeeze(length, op.Constant(value_ints=[0])),
        op.Constant(value_int=1),
    )
    seen = op.Less(place, limit)
    hidden = op.Constant(value_float=float("-inf"))
    weights = op.Softmax(op.Where(seen, scores, hidden), axis=-1)
    out = op.Transpose(op.MatMul(weights, v), perm=[0, 3, 1, 2, 4])
    return op.CastLike(op.Reshape(out, op.Concat(minus, heads, size, axis=0)), q)


@script(_opset, default_opset=op)
def route(
    logits,
    bias,
    top_k: int,
    sigmoid: int,
    groups: int,
    kept_groups: int,
    renormalize: int,
    scale: float,
):
    """logits [R, E] -> weights f32 [R, k], experts i32 [R, k], best first, ties to the lowest index.

    Chosen by score + bias, within the kept groups (a group's score is the sum of its two best).
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    low = op.Constant(value_float=float("-inf"))
    z = op.Cast(logits, to=1)
    use_sigmoid = op.Cast(op.Constant(value_int=sigmoid), to=9)
    s = op.Where(use_sigmoid, op.Sigmoid(z), op.Softmax(z, axis=-1))
    by = s + op.Cast(bias, to=1)
    by = op.Where(op.IsNaN(by), low, by)
    g = op.Reshape(op.Constant(value_int=groups), one)
    experts = op.Shape(z, start=1)
    grouped = op.Reshape(by, op.Concat(zero, g, last, axis=0))
    two = op.Min(op.Constant(value_ints=[2]), experts / g)
    best, _best_at = op.TopK(grouped, two, axis=-1)
    group_score = op.ReduceSum(best, last, keepdims=0)
    kept = op.Reshape(op.Constant(value_int=kept_groups), one)
    _kept_score, kept_at = op.TopK(group_score, kept, axis=-1)
    nothing = op.Cast(op.Mul(op.Cast(op.IsNaN(group_score), to=1), 0.0), to=1)
    ones = op.Cast(op.GreaterOrEqual(kept_at, op.Constant(value_int=0)), to=1)
    keep = op.Cast(op.ScatterElements(nothing, kept_at, ones, axis=1), to=9)
    left = op.Where(op.Unsqueeze(keep, last), grouped, low)
    by = op.Reshape(left, op.Shape(z))
    _score, order = op.TopK(by, op.Reshape(op.Constant(value_int=top_k), one), axis=-1)
    weights = op.GatherElements(s, order, axis=-1)
    renormal = op.Cast(op.Constant(value_int=renormalize), to=9)
    total = op.ReduceSum(weights, last, keepdims=1) + op.Constant(value_float=1e-20)
    weights = weights / op.Where(renormal, total, op.Constant(value_float=1.0))
    return weights * scale, op.Cast(order, to=6)


@script(_opset, default_opset=op)
def silu(x):
    wide = op.Cast(x, to=1)
    return op.CastLike(wide * op.Sigmoid(wide), x)


@script(_opset, default_opset=op)
def gelu(x):
    wide = op.Cast(x, to=1)
    root = op.Constant(value_float=0.7071067811865476)
    half = op.Constant(value_float=0.5)
    return op.CastLike(wide * half * (op.Erf(wide * root) + op.Constant(value_float=1.0)), x)


@script(_opset, default_opset=op)
def gelu_tanh(x):
    wide = op.Cast(x, to=1)
    root = op.Constant(value_float=0.7978845608028654)
    cubed = wide * wide * wide * op.Constant(value_float=0.044715)
    inner = op.Tanh((wide + cubed) * root)
    half = op.Constant(value_float=0.5)
    return op.CastLike(wide * half * (inner + op.Constant(value_float=1.0)), x)


@script(_opset, default_opset=op)
def relu(x):
    return op.Relu(x)


def _moe_ffn(act):
    """moe_ffn of one activation: without biases, and with both."""

    @script(_opset, default_opset=op)
    def moe_ffn(x, weights, experts, gate_up, down):
        """y[r] = sum_j w[r, j] FFN_{e[r, j]}(x[r]); the experts that have rows, in ascending order.

        x [R, D], gate_up [E, 2F, D] (gate first), down [E, D, F].
        """
        zero = op.Constant(value_ints=[0])
        one = op.Constant(value_ints=[1])
        chosen = op.Cast(experts, to=7)
        touched, _first, _inverse, _count = op.Unique(chosen, sorted=1)
        out = op.Cast(x, to=1) * 0.0
        n = op.Squeeze(op.Shape(touched), zero)
        for i in range(n):
            e = op.Gather(touched, i)
            hits = op.NonZero(op.Equal(chosen, e))
            row = op.Gather(hits, op.Constant(value_int=0))
            w = op.GatherND(weights, op.Transpose(hits, perm=[1, 0]))
            both = op.Gemm(op.Gather(x, row), op.Gather(gate_up, e), transB=1)
            gate, up = op.Split(both, axis=-1, num_outputs=2)
            y = op.Gemm(act(gate) * up, op.Gather(down, e), transB=1)
            added = op.Gather(out, row) + op.Unsqueeze(w, one) * op.Cast(y, to=1)
            out = op.ScatterND(out, op.Unsqueeze(row, one), added)
        return op.CastLike(out, x)

    @script(_opset, default_opset=op)
    def moe_ffn_biased(x, weights, experts, gate_up, down, gate_up_bias, down_bias):
        """moe_ffn with biases gate_up_bias [E, 2F] and down_bias [E, D]"""
        zero = op.Constant(value_ints=[0])
        one = op.Constant(value_ints=[1])
        chosen = op.Cast(experts, to=7)
        touched, _first, _inverse, _count = op.Unique(chosen, sorted=1)
        out = op.Cast(x, to=1) * 0.0
        n = op.Squeeze(op.Shape(touched), zero)
        for i in range(n):
            e = op.Gather(touched, i)
            hits = op.NonZero(op.Equal(chosen, e))
            row = op.Gather(hits, op.Constant(value_int=0))
            w = op.GatherND(weights, op.Transpose(hits, perm=[1, 0]))
            both = op.Gemm(
                op.Gather(x, row), op.Gather(gate_up, e), op.Gather(gate_up_bias, e), transB=1
            )
            gate, up = op.Split(both, axis=-1, num_outputs=2)
            y = op.Gemm(act(gate) * up, op.Gather(down, e), op.Gather(down_bias, e), transB=1)
            added = op.Gather(out, row) + op.Unsqueeze(w, one) * op.Cast(y, to=1)
            out = op.ScatterND(out, op.Unsqueeze(row, one), added)
        return op.CastLike(out, x)

    return moe_ffn, moe_ffn_biased


MOE_FFN = {act.name: _moe_ffn(act) for act in (silu, gelu, gelu_tanh, relu)}
for _activation, _pair in MOE_FFN.items():
    for _function in _pair:
        _function.function_ir.name = f"{_function.function_ir.name}_{_activation}"


@script(_opset, default_opset=op)
def mix(x):
    """A 32-bit integer hash (lowbias32) on 64-bit values below 2^32."""
    mask = op.Constant(value_int=0xFFFFFFFF)
    sixteen = op.Cast(op.Constant(value_int=16), to=13)
    fifteen = op.Cast(op.Constant(value_int=15), to=13)
    a = op.BitwiseXor(x, op.Cast(op.BitShift(op.Cast(x, to=13), sixteen, direction="RIGHT"), to=7))
    b = op.BitwiseAnd(a * op.Constant(value_int=0x7FEB352D), mask)
    c = op.BitwiseXor(b, op.Cast(op.BitShift(op.Cast(b, to=13), fifteen, direction="RIGHT"), to=7))
    d = op.BitwiseAnd(c * op.Constant(value_int=0x846CA68B), mask)
    return op.BitwiseXor(
        d, op.Cast(op.BitShift(op.Cast(d, to=13), sixteen, direction="RIGHT"), to=7)
    )


@script(_opset, default_opset=op)
def gumbel(seed, tick, pos, vocab):
    """Gumbel noise f32 [C, V] of request, iteration, position and token; seed, tick, pos [C], vocab []."""
    mask = op.Constant(value_int=0xFFFFFFFF)
    half = op.Cast(op.Constant(value_int=32), to=13)
    high = op.Cast(op.BitShift(op.Cast(seed, to=13), half, direction="RIGHT"), to=7)
    a = mix(op.BitwiseXor(op.BitwiseAnd(seed, mask), mix(high)))
    b = mix(op.BitwiseXor(a, op.BitwiseAnd(tick, mask)))
    key = mix(op.BitwiseAnd(b + pos * op.Constant(value_int=0x9E3779B9), mask))
    token = op.Range(op.Constant(value_int=0), vocab, op.Constant(value_int=1))
    spread = op.Unsqueeze(key, op.Constant(value_ints=[1])) + token * op.Constant(
        value_int=0x85EBCA6B
    )
    u = op.Cast(mix(op.BitwiseAnd(spread, mask)), to=13)
    eight = op.Cast(op.Constant(value_int=8), to=13)
    top = op.Cast(op.BitShift(u, eight, direction="RIGHT"), to=11)
    step = op.Cast(op.Constant(value_float=5.9604644775390625e-08), to=11)
    uniform = (top + op.Cast(op.Constant(value_float=0.5), to=11)) * step
    return op.Cast(-op.Log(-op.Log(uniform)), to=1)


@script(_opset, default_opset=op)
def choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id: int):
    """Token, confidence, margin, entropy, score of the token [B, n]; probabilities and scores of `asked` [B, n, S].

    logits [B, n, V].  The token is the best but for the mask id, with temperature t > 0 the best of
    logits / t + Gumbel noise.
    """
    low = op.Constant(value_float=float("-inf"))
    none = op.Constant(value_float=0.0)
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    last = op.Constant(value_ints=[-1])
    shape = op.Shape(live)
    vocab = op.Shape(logits, start=2)
    flat = op.Reshape(logits, op.Concat(last, vocab, axis=0))
    z = op.Cast(flat, to=1)
    z = op.Where(op.IsNaN(z), low, z)
    p = op.Softmax(z, axis=-1)
    log_p = op.LogSoftmax(z, axis=-1)
    entropy = -op.ReduceSum(op.Where(p > none, p * log_p, none), last, keepdims=0)
    token_ids = op.Range(
        op.Constant(value_int=0), op.Squeeze(vocab, zero), op.Constant(value_int=1)
    )
    is_mask = op.Equal(token_ids, op.Constant(value_int=mask_id))
    without = op.Where(is_mask, low, z)
    warm = op.Greater(temperature, none)
    hot = op.ReduceMax(op.Cast(warm, to=1), keepdims=0) > none
    if hot:
        t = op.Reshape(op.Expand(op.Unsqueeze(temperature, one), shape), last)
        s = op.Reshape(op.Expand(op.Unsqueeze(seed, one), shape), last)
        c = op.Reshape(op.Expand(op.Unsqueeze(tick, one), shape), last)
        noise = gumbel(s, c, op.Reshape(pos, last), op.Squeeze(vocab, zero))
        some = op.Unsqueeze(t > none, one)
        by = op.Where(some, op.Unsqueeze(t, one), op.Constant(value_float=1.0))
        score = op.Where(some, without / by + noise, without)
    else:
        score = op.Identity(without)
    floor = op.Constant(value_float=-3.4028234663852886e38)
    token = op.ArgMax(op.Where(is_mask, low, op.Max(score, floor)), axis=-1, keepdims=1)
    confidence = op.GatherElements(p, token, axis=-1)
    best, _at = op.TopK(op.Where(is_mask, none, p), op.Constant(value_ints=[2]), axis=-1)
    margin = op.Gather(best, op.Constant(value_int=0), axis=1) - op.Gather(
        best, op.Constant(value_int=1), axis=1
    )
    chosen_score = op.GatherElements(score, token, axis=-1)
    per_row = op.Concat(op.Shape(z, end=1), op.Shape(asked, start=2), axis=0)
    of = op.Reshape(asked, per_row, allowzero=1)
    asked_p = op.Reshape(op.GatherElements(p, of, axis=-1), op.Shape(asked), allowzero=1)
    asked_score = op.Reshape(op.GatherElements(score, of, axis=-1), op.Shape(asked), allowzero=1)
    on = op.Unsqueeze(live, last)
    token = op.Where(live, op.Reshape(token, shape), op.Constant(value_int=-1))
    confidence = op.Reshape(confidence, shape)
    confidence = op.Where(live, op.Where(op.IsNaN(confidence), none, confidence), low)
    margin = op.Reshape(margin, shape)
    margin = op.Where(live, op.Where(op.IsNaN(margin), none, margin), low)
    entropy = op.Reshape(entropy, shape)
    entropy = op.Where(live, op.Where(op.IsNaN(entropy), none, entropy), none)
    chosen_score = op.Reshape(chosen_score, shape)
    chosen_score = op.Where(live, op.Where(op.IsNaN(chosen_score), none, chosen_score), low)
    asked_p = op.Where(on, op.Where(op.IsNaN(asked_p), none, asked_p), none)
    asked_score = op.Where(on, op.Where(op.IsNaN(asked_score), none, asked_score), low)
    return token, confidence, margin, entropy, chosen_score, asked_p, asked_score


@script(_opset, default_opset=op)
def choose(logits, live, temperature, seed, tick, pos, mask_id: int):
    """Token i64, confidence, margin and entropy f32, each [B, n], of logits [B, n, V]."""
    nothing = op.Slice(
        op.Unsqueeze(pos, op.Constant(value_ints=[2])),
        op.Constant(value_ints=[0]),
        op.Constant(value_ints=[0]),
        op.Constant(value_ints=[2]),
    )
    token, confidence, margin, entropy, _score, _p, _s = choose_asked(
        logits, live, temperature, seed, tick, pos, nothing, mask_id=mask_id
    )
    return token, confidence, margin, entropy


FUNCTIONS = {
    function.function_ir.name: function
    for function in (
        *(f for f in list(globals().values()) if isinstance(f, values.OnnxFunction)),
        *(f for pair in MOE_FFN.values() for f in pair),
    )
}


def call(function):
    """The function as an operator: a call of it is one node, which nothing inlines."""
    ir = function.function_ir
    types = sorted(onnx.defs.get_schema("Identity").type_constraints[0].allowed_type_strs)
    schema = onnx.defs.OpSchema(
        ir.name,
        DOMAIN,
        VERSION,
        inputs=[_formal(value.name, f"TIn{i}") for i, value in enumerate(ir.inputs)],
        outputs=[_formal(value.name, f"TOut{i}") for i, value in enumerate(ir.outputs)],
        type_constraints=[
            *((f"TIn{i}", types, "") for i in range(len(ir.inputs))),
            *((f"TOut{i}", types, "") for i in range(len(ir.outputs))),
        ],
        attributes=[
            onnx.defs.OpSchema.Attribute(
                name, getattr(onnx.defs.OpSchema.AttrType, attribute.type.name), required=True
            )
            for name, attribute in ir.attributes.items()
        ],
    )
    return values.Op(_opset, ir.name, schema)


def _formal(name, kind):
    return onnx.defs.OpSchema.FormalParameter(name, kind)
