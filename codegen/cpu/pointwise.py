"""What each pointwise operator is in C++, for one element."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from dcompile.ir.edit import value

aten = torch.ops.aten

CTYPE = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
HALVES = (torch.bfloat16, torch.float16)

UNARY = {
    "neg": "-({0})",
    "exp": "std::exp({0})",
    "log": "std::log({0})",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "(1.0f / std::sqrt({0}))",
    "reciprocal": "(1.0f / ({0}))",
    "sigmoid": "sigmoid({0})",
    "silu": "(({0}) * sigmoid({0}))",
    "tanh": "std::tanh({0})",
    "sin": "std::sin({0})",
    "cos": "std::cos({0})",
    "erf": "std::erf({0})",
    "relu": "most({0}, ({0}) * 0)",
    "abs": "std::abs({0})",
    "floor": "std::floor({0})",
    "square": "(({0}) * ({0}))",
    "logical_not": "!({0})",
    "isnan": "(({0}) != ({0}))",
    "isinf": "std::isinf({0})",
}
BINARY = {
    "mul": "(({0}) * ({1}))",
    "maximum": "most({0}, {1})",
    "minimum": "least({0}, {1})",
    "eq": "(({0}) == ({1}))",
    "ne": "(({0}) != ({1}))",
    "lt": "(({0}) < ({1}))",
    "le": "(({0}) <= ({1}))",
    "gt": "(({0}) > ({1}))",
    "ge": "(({0}) >= ({1}))",
    "logical_and": "(({0}) && ({1}))",
    "logical_or": "(({0}) || ({1}))",
    "bitwise_and": "(({0}) & ({1}))",
    "bitwise_or": "(({0}) | ({1}))",
    "bitwise_xor": "(({0}) ^ ({1}))",
    "__and__": "(({0}) & ({1}))",
    "__or__": "(({0}) | ({1}))",
    "floor_divide": "floor_div({0}, {1})",
    "remainder": "floor_mod({0}, {1})",
    "pow": "std::pow({0}, {1})",
}
COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}


def op_name(node: Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.partition("::")[2]


def formula(node: Node, arg: Callable[..., str]) -> str:
    """A C expression of the node's element; `arg(x, kind)` is an argument's, cast where `kind` is a C type."""
    target, name, out = node.target, op_name(node), value(node).dtype
    args = node.args
    kind = arithmetic(out)
    if target is aten._to_copy.default:
        source = value(args[0]).dtype
        text = arg(args[0])
        if out in HALVES:
            return f"rounded<{CTYPE[out]}>((float)({text}))"
        if source.is_floating_point and not out.is_floating_point and out != torch.bool:
            return f"({CTYPE[out]})({text})"
        return f"({kind})({text})"
    if target is aten.expand.default:
        return arg(args[0])
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        return f"({arg(args[0])} ? {arg(args[1], kind)} : {arg(args[2], kind)})"
    if target is aten.masked_fill.Scalar:
        return f"({arg(args[1])} ? {arg(args[2], kind)} : {arg(args[0], kind)})"
    if target in (aten.zeros_like.default, aten.ones_like.default):
        return f"({kind}){int(target is aten.ones_like.default)}"
    if target is aten.full_like.default:
        return literal(args[1], kind)
    if name in ("clamp", "clamp_min", "clamp_max"):
        low, high = (*args[1:3], None, None)[:2]
        if name == "clamp_max":
            low, high = None, args[1]
        text = arg(args[0], kind)
        if low is not None:
            text = f"most<{kind}>({text}, {arg(low, kind)})"
        return text if high is None else f"least<{kind}>({text}, {arg(high, kind)})"
    if target is aten.bitwise_not.default:
        return f"{'!' if out == torch.bool else '~'}({arg(args[0])})"
    if name in ("add", "sub", "rsub"):
        a, b = args[:2] if name != "rsub" else args[1::-1]
        alpha = node.kwargs.get("alpha", 1)
        sign = "-" if name != "add" else "+"
        scaled = arg(b, kind) if alpha == 1 else f"{literal(alpha, kind)} * {arg(b, kind)}"
        return f"({arg(a, kind)} {sign} {scaled})"
    if name == "div":
        return f"({arg(args[0], 'float')} / {arg(args[1], 'float')})"
    if name == "gelu":
        tanh = node.kwargs.get("approximate", "none") == "tanh"
        return f"{'gelu_tanh' if tanh else 'gelu'}({arg(args[0], kind)})"
    if name in UNARY:
        inner = None if name in ("logical_not", "isnan", "isinf") else kind
        return UNARY[name].format(arg(args[0], inner))
    if name in COMPARE:
        common = arithmetic(_common(args))
        return BINARY[name].format(arg(args[0], common), arg(args[1], common))
    return BINARY[name].format(arg(args[0], kind), arg(args[1], kind))


def _common(args: tuple[object, ...]) -> torch.dtype:
    dtypes = [value(a).dtype for a in args if isinstance(a, Node)]
    numbers = [a for a in args if isinstance(a, float)]
    out = dtypes[0]
    for d in dtypes[1:]:
        out = torch.promote_types(out, d)
    return torch.float32 if numbers and not out.is_floating_point else out


def arithmetic(dtype: torch.dtype) -> str:
    """The C type that elements of the dtype are computed in."""
    if dtype == torch.bool:
        return "bool"
    if dtype == torch.float64:
        return "double"
    return "float" if dtype.is_floating_point else "int64_t"


def literal(x: object, kind: str | None) -> str:
    """A number as C text, cast where `kind` names a C type."""
    if isinstance(x, bool):
        return "true" if x else "false"
    assert isinstance(x, (int, float)), f"not a number: {x!r}"
    if isinstance(x, float) and math.isinf(x):
        return f"({'-' if x < 0 else ''}std::numeric_limits<float>::infinity())"
    if isinstance(x, float) and math.isnan(x):
        return "std::numeric_limits<float>::quiet_NaN()"
    text = f"{x!r}f" if isinstance(x, float) else f"INT64_C({x})"
    return f"({kind})({text})" if kind else text
