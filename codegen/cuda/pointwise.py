"""An element-wise operator as a Triton expression of its arguments' expressions."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcompile.codegen.cuda.tiles import TYPES, Text, join, kind_of, literal
from dcompile.ir import operators
from dcompile.ir.edit import value

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
FUNCTIONS = (
    "gelu",
    "gelu_tanh",
    "power",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
)  # of kernels/pointwise.py

UNARY = {
    "neg": "-{0}",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    "reciprocal": "tl.div_rn(1.0, {0})",
    "sigmoid": "sigmoid({0})",
    "silu": "silu({0})",
    "tanh": "tanh({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "erf": "tl.erf({0})",
    "relu": "relu({0})",
    "abs": "tl.abs({0})",
    "floor": "tl.floor({0})",
    "square": "{0} * {0}",
    "logical_not": "{0} == 0",
    "isnan": "{0} != {0}",
    "isinf": 'tl.abs({0}) == float("inf")',
}
TESTS = ("logical_not", "isnan", "isinf")
BINARY = {
    "mul": "{0} * {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_xor": "{0} ^ {1}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "__and__": "{0} & {1}",
    "__or__": "{0} | {1}",
    "__xor__": "{0} ^ {1}",
    "bitwise_right_shift": "{0} >> {1}",
    "bitwise_left_shift": "{0} << {1}",
    "__rshift__": "{0} >> {1}",
    "__lshift__": "{0} << {1}",
    "pow": "power({0}, {1})",
}
COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
OTHER = {
    *("add", "sub", "rsub", "div", "gelu", "clamp", "clamp_min", "clamp_max", "maximum"),
    *("minimum", "floor_divide", "remainder", "where", "masked_fill", "zeros_like", "ones_like"),
    *("full_like", "_to_copy", "bitwise_not", "expand", "log1p"),
}
FLOATS_ONLY = {
    *("exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "tanh", "sin", "cos"),
    *("erf", "floor", "gelu", "log1p"),
}


def op_name(node: Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.partition("::")[2]


def is_pointwise(node: Node) -> bool:
    """Whether `element` can print the node."""
    if node.target is operators.SILU_MUL:
        return True
    name = op_name(node)
    if not name or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if any(isinstance(a, Node) and value(a).dtype not in TYPES for a in node.args):
        return False
    if node.kwargs.get("rounding_mode") is not None:
        return False
    return name in UNARY or name in BINARY or name in OTHER


class Arguments:
    """The arguments of a node, each as a Text in the kind that the operator computes in."""

    def __init__(self, node: Node, read: object) -> None:
        self.node, self._read = node, read

    def __call__(self, x: object, kind: str | None = None) -> Text:
        if isinstance(x, Node):
            text: Text = self._read(x)
            return text if kind is None else text.to(kind)
        assert isinstance(x, (bool, int, float)), f"not a number: {x!r}"
        own = "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "float"
        return literal(x, kind or own)


def element(node: Node, read: object) -> Text:
    """The node's element, `read(argument)` being the elements of its tensor arguments."""
    arg, args, name = Arguments(node, read), node.args, op_name(node)
    out = value(node).dtype
    kind = kind_of(out)
    if node.target is operators.SILU_MUL:
        gate, up = arg(args[0], "float"), arg(args[1], "float")
        return _rounded(Text(f"(silu({gate.text}) * {up.text})", kind, join(gate, up)), out)
    if name == "_to_copy":
        return _cast(arg(args[0]), value(args[0]).dtype, out)
    if name == "expand":
        return arg(args[0])
    if name in ("zeros_like", "ones_like"):
        return literal(int(name == "ones_like"), kind)
    if name == "full_like":
        return literal(args[1], kind)
    if name == "where":
        made = [arg(args[0], "bool"), arg(args[1], kind), arg(args[2], kind)]
        text = "tl.where({}, {}, {})".format(*(m.text for m in made))
    elif name == "masked_fill":
        made = [arg(args[1], "bool"), arg(args[2], kind), arg(args[0], kind)]
        text = "tl.where({}, {}, {})".format(*(m.text for m in made))
    elif name.startswith("clamp"):
        return _rounded(_clamped(arg, args, name, kind), out)
    elif name in ("maximum", "minimum"):
        return _extreme(name, arg(args[0], kind), arg(args[1], kind))
    elif name == "bitwise_not":
        made = [arg(args[0], kind)]
        text = f"({made[0].text} {'== 0' if kind == 'bool' else '^ -1'})"
    elif name in ("add", "sub", "rsub"):
        a, b = args[:2] if name != "rsub" else args[1::-1]
        alpha = node.kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        made = [arg(a, kind), arg(b, kind)]
        times = "" if alpha == 1 else f"{literal(alpha, kind).text} * "
        text = f"({made[0].text} {'+' if name == 'add' else '-'} {times}{made[1].text})"
        if kind == "bool":  # of booleans, a sum is their disjunction
            text = f"({made[0].text} | {made[1].text})"
    elif name == "div":
        wide = "double" if kind == "double" else "float"
        made = [arg(args[0], wide), arg(args[1], wide)]
        text = _divided(*made).text
    elif name in ("floor_divide", "remainder"):
        return _rounded(_floored(name, arg(args[0], kind), arg(args[1], kind)), out)
    elif name == "gelu":
        made = [arg(args[0], kind)]
        tanh = node.kwargs.get("approximate", "none") == "tanh"
        text = f"{'gelu_tanh' if tanh else 'gelu'}({made[0].text})"
    elif name == "log1p":
        made = [arg(args[0], kind)]
        text = f"tl.log(1.0 + {made[0].text})"
    elif name in UNARY:
        inner = kind_of(value(args[0]).dtype) if name in TESTS else kind
        made = [arg(args[0], inner)]
        text = f"({UNARY[name].format(made[0].text)})"
    elif name == "pow":
        made = [arg(args[0], kind), arg(args[1], kind)]
        text = _power(*made, args[1]).text
    else:
        common = _common(args) if name in COMPARE else kind
        made = [arg(args[0], common), arg(args[1], common)]
        text = f"({BINARY[name].format(*(m.text for m in made))})"
    return _rounded(Text(text, kind, join(*made)), out)


def _rounded(x: Text, dtype: torch.dtype) -> Text:
    """Halves are rounded after every operator, as when each of them is run by itself."""
    if dtype not in HALVES:
        return x
    half = "bfloat16" if dtype == torch.bfloat16 else "float16"
    return Text(f"({x.text}).to(tl.{half}).to(tl.float32)", x.kind, x.axes)


def _cast(x: Text, source: torch.dtype, out: torch.dtype) -> Text:
    kind = kind_of(out)
    if kind == "int" and out != torch.int64 and source != out:
        return Text(f"{x.to('int').text}.to(tl.{_integer(out)}).to(tl.int64)", kind, x.axes)
    return _rounded(x.to(kind), out)


def _integer(dtype: torch.dtype) -> str:
    return {"u8": "uint8"}.get(TYPES[dtype], f"int{TYPES[dtype][1:]}")


def _divided(a: Text, b: Text) -> Text:
    text = f"({a.text} / {b.text})" if a.kind == "double" else f"tl.div_rn({a.text}, {b.text})"
    return Text(text, a.kind, join(a, b))


def _clamped(arg: Arguments, args: tuple[object, ...], name: str, kind: str) -> Text:
    low, high = (*args[1:3], None, None)[:2]
    if name == "clamp_max":
        low, high = None, args[1]
    out = arg(args[0], kind)
    if low is not None:
        out = _extreme("maximum", out, arg(low, kind))
    return out if high is None else _extreme("minimum", out, arg(high, kind))


def _extreme(name: str, a: Text, b: Text) -> Text:
    """NaN wins, as in torch."""
    if a.kind == "bool":
        return Text(f"({a.text} {'|' if name == 'maximum' else '&'} {b.text})", "bool", join(a, b))
    nan = ", propagate_nan=tl.PropagateNan.ALL" if a.kind in ("float", "double") else ""
    return Text(f"tl.{name}({a.text}, {b.text}{nan})", a.kind, join(a, b))


def _floored(name: str, a: Text, b: Text) -> Text:
    """Towards minus infinity, where Triton's integers go towards zero."""
    axes = join(a, b)
    if a.kind in ("float", "double"):
        quotient = f"tl.floor({_divided(a, b).text})"
        text = quotient if name == "floor_divide" else f"({a.text} - {quotient} * {b.text})"
        return Text(text, a.kind, axes)
    rest = f"({a.text} % {b.text})"
    wrong = f"(({rest} != 0) & (({rest} < 0) != ({b.text} < 0)))"
    if name == "remainder":
        return Text(f"({rest} + tl.where({wrong}, {b.text}, 0))", a.kind, axes)
    return Text(f"({a.text} // {b.text} - {wrong}.to(tl.int64))", a.kind, axes)


def _power(a: Text, b: Text, exponent: object) -> Text:
    known = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "tl.sqrt_rn({0})", 1: "{0}"}
    if isinstance(exponent, (int, float)) and exponent in known:
        return Text(f"({known[exponent].format(a.text)})", a.kind, a.axes)
    y = b.text if isinstance(exponent, Node) else f"tl.full([], {b.text}, tl.float32)"
    return Text(f"power({a.text}, {y})", a.kind, join(a, b))


def _common(args: tuple[object, ...]) -> str:
    """In what two values are compared."""
    dtypes = [value(a).dtype for a in args if isinstance(a, Node)]
    out = dtypes[0]
    for d in dtypes[1:]:
        out = torch.promote_types(out, d)
    kind = kind_of(out)
    if any(isinstance(a, float) for a in args) and kind in ("int", "bool"):
        return "float"
    return "int" if kind == "bool" and any(type(a) is int for a in args) else kind
