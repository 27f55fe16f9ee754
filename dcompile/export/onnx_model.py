"""The step as an ONNX model: torch.onnx over onnxscript functions, weights streamed beside or into the file."""

# Types of operators are ONNX's, which mypy does not know.
# mypy: disable-error-code="no-untyped-call,type-var,arg-type"

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import opset18 as op

from dcompile.errors import UnsupportedModel
from dcompile.export import onnx_functions as functions
from dcompile.export.onnx_functions import call
from dcompile.export.step import WITHOUT_BODY, Portable
from dcompile.ir import operators

aten = torch.ops.aten
OPSET = 18  # what torch.onnx writes by itself; converting would inline the functions


def onnx_model(step: Portable) -> onnx_ir.Model:
    """The step's graph with its weights as inputs, named as the program names them."""
    names = [w.name for w in step.weights] + [p.name for p in step.inputs]
    with _quiet():
        try:
            made = torch.onnx.export(
                step.exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=list(step.outputs),
                custom_translation_table=TRANSLATIONS,
                optimize=False,
                verbose=False,
            )
        except Exception as failure:  # the exporter's own errors are many, and private
            cause = failure.__cause__ or failure
            first = next((line for line in str(cause).splitlines() if line.strip()), "")
            raise UnsupportedModel(
                f"torch.onnx cannot export the step: {first}",
                remedy="--format pt2 takes every ATen operator",
            ) from failure
    assert made is not None
    model: onnx_ir.Model = made.model
    add_functions(model)
    _name_axes(model, step)
    passes.ClearMetadataAndDocStringPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _name_axes(model: onnx_ir.Model, step: Portable) -> None:
    """Call the moving axes batch, length and window, wherever export's symbols stand."""
    names: dict[str, str] = {}
    for value, port in zip(model.graph.inputs[len(step.weights) :], step.inputs, strict=True):
        assert value.shape is not None
        for dim, axis in zip(value.shape, port.shape, strict=True):
            if isinstance(axis, str):
                names[str(dim)] = axis
    pattern = re.compile(r"\b(" + "|".join(names) + r")\b")
    values = [*model.graph.inputs, *(o for n in model.graph.all_nodes() for o in n.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                d if isinstance(d, int) else pattern.sub(lambda m: names[m[0]], str(d))
                for d in value.shape
            )


def add_functions(model: onnx_ir.Model) -> None:
    """Put the bodies of the functions that the graph calls, and those that they call, into the model."""
    waiting = [n.op_type for n in model.graph.all_nodes() if n.domain == functions.DOMAIN]
    while waiting:
        name = waiting.pop()
        proto = functions.FUNCTIONS[name].to_function_proto()
        body = onnx_ir.serde.deserialize_function(proto)
        # onnxscript forgets the imports of what is called inside a branch.
        body.opset_imports.update({"": OPSET, functions.DOMAIN: functions.VERSION})
        if body.identifier() not in model.functions:
            model.functions[body.identifier()] = body
            waiting += [n.op_type for n in body.graph.all_nodes() if n.domain == functions.DOMAIN]
    model.graph.opset_imports[functions.DOMAIN] = functions.VERSION


@contextmanager
def _quiet() -> Iterator[None]:
    """No chatter of the exporters about their own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rms_norm(x, shape, weight=None, eps=None):  # type: ignore[no-untyped-def]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    if weight is None:
        return call(functions.rms_normalize)(x, eps=eps)
    return call(functions.rms_norm)(x, weight, eps=eps)


def _add_rms_norm(x, r, weight, eps):  # type: ignore[no-untyped-def]
    if weight is None:
        return call(functions.add_rms_normalize)(x, r, eps=eps)
    return call(functions.add_rms_norm)(x, r, weight, eps=eps)


def _linear(x, weight, bias=None):  # type: ignore[no-untyped-def]
    """One Gemm over all rows: the weight stays as it is stored, [out, in]."""
    rows = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), op.Shape(x, start=-1), axis=0))
    y = op.Gemm(rows, weight, transB=1) if bias is None else op.Gemm(rows, weight, bias, transB=1)
    return op.Reshape(y, op.Concat(op.Shape(x, end=-1), op.Shape(weight, end=1), axis=0))


def _norm_rope_write(  # type: ignore[no-untyped-def]
    qkv, q_norm, k_norm, cos, sin, row_seq, row_pos, keys, values, heads, eps
):
    rest = (cos, sin, row_seq, row_pos, keys, values)
    if q_norm is None and k_norm is None:
        return call(functions.plain_rope_write)(qkv, *rest, heads=heads)
    if k_norm is None:
        return call(functions.q_norm_rope_write)(qkv, q_norm, *rest, heads=heads, eps=eps)
    if q_norm is None:
        return call(functions.k_norm_rope_write)(qkv, k_norm, *rest, heads=heads, eps=eps)
    return call(functions.norm_rope_write)(qkv, q_norm, k_norm, *rest, heads=heads, eps=eps)


def _attend(q, keys, values, row_seq, row_limit, scale):  # type: ignore[no-untyped-def]
    return call(functions.attend)(q, keys, values, row_limit, scale=scale)


def _write_rows(cache, rows, row_seq, row_pos):  # type: ignore[no-untyped-def]
    return call(functions.write_rows)(cache, rows, row_seq, row_pos)


def _silu_mul(gate, up):  # type: ignore[no-untyped-def]
    return call(functions.silu_mul)(gate, up)


def _route(logits, bias, top_k, score, groups, kept_groups, renormalize, scale):  # type: ignore[no-untyped-def]
    if score not in ("softmax", "sigmoid"):
        raise UnsupportedModel(
            f"routing by {score} has no ONNX function", remedy="--format pt2, or compile it"
        )
    if bias is None:
        bias = op.Constant(value_float=0.0)
    return call(functions.route)(
        logits,
        bias,
        top_k=top_k,
        sigmoid=int(score == "sigmoid"),
        groups=groups,
        kept_groups=kept_groups,
        renormalize=int(renormalize),
        scale=float(scale),
    )


def _moe_ffn(x, weights, experts, gate_up, down, gate_up_bias, down_bias, activation):  # type: ignore[no-untyped-def]
    plain, biased = functions.MOE_FFN[activation]
    if gate_up_bias is None and down_bias is None:
        return call(plain)(x, weights, experts, gate_up, down)
    if gate_up_bias is None:
        gate_up_bias = _zeros(gate_up, down)
    if down_bias is None:
        down_bias = _zeros(down, gate_up)
    return call(biased)(x, weights, experts, gate_up, down, gate_up_bias, down_bias)


def _zeros(weight, other):  # type: ignore[no-untyped-def]
    """A bias of nothing for weight [E, out, in]: zeros [E, out]."""
    shape = op.Shape(weight, end=2)
    return op.CastLike(op.ConstantOfShape(shape), other)


def _choose(logits, live, temperature, seed, tick, pos, mask_id):  # type: ignore[no-untyped-def]
    return call(functions.choose)(logits, live, temperature, seed, tick, pos, mask_id=mask_id)


def _choose_asked(logits, live, temperature, seed, tick, pos, asked, mask_id):  # type: ignore[no-untyped-def]
    return call(functions.choose_asked)(
        logits, live, temperature, seed, tick, pos, asked, mask_id=mask_id
    )


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.rms_norm.default: _rms_norm,
    aten.linear.default: _linear,
    operators.ADD_RMS_NORM: _add_rms_norm,
    operators.NORM_ROPE_WRITE: _norm_rope_write,
    operators.WRITE_ROWS: _write_rows,
    operators.ATTEND: _attend,
    operators.SILU_MUL: _silu_mul,
    operators.ROUTE: _route,
    operators.MOE_FFN: _moe_ffn,
    operators.CHOOSE: _choose,
    operators.CHOOSE_ASKED: _choose_asked,
}
WITHOUT_FUNCTION = WITHOUT_BODY  # what one format lacks, both do
