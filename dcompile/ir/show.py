"""Print a program: the same program gives the same bytes, on any machine."""

from __future__ import annotations

import torch
from torch.fx import Node

from dcompile.ir.meta import facts
from dcompile.ir.program import Program
from dcompile.ir.sizes import Size, size_of

SHORT = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def show(program: Program) -> str:
    """The graph as straight-line Python, one value a line, with the module that it came from."""
    return "\n".join(show_node(node, program) for node in program.graph.nodes) + "\n"


def show_node(node: Node, program: Program) -> str:
    if node.op == "output":
        return f"return {_show_arg(tuple(node.args[0]))}"  # type: ignore[arg-type]
    value = show_value(node.meta.get("val"), program)
    if node.op == "placeholder":
        kind = program.input(node.name).kind
        return f"{node.name}: {value}  # {kind}"
    parts = [_show_arg(a) for a in node.args]
    parts += [f"{key}={_show_arg(arg)}" for key, arg in node.kwargs.items()]
    found = facts(node)
    tail = f"  # {found.origin}" if found.origin else ""
    if found.buffer is not None:
        tail += f"  @{found.buffer}"
    return f"{node.name}: {value} = {target_name(node)}({', '.join(parts)}){tail}"


def target_name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        space, _, name = str(node.target._name).partition("::")
        overload = node.target._overloadname
        full = f"{name.partition('.')[0]}.{overload}"
        return full if space == "aten" else f"{space}.{full.removesuffix('.default')}"
    return getattr(node.target, "__name__", str(node.target))


def show_value(value: object, program: Program) -> str:
    if isinstance(value, torch.Tensor):
        dims = ", ".join(_show_size(size_of(d, program.symbols)) for d in value.shape)
        return f"{SHORT[value.dtype]}[{dims}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(show_value(v, program) for v in value) + ")"
    if isinstance(value, (int, torch.SymInt)):
        return "int"
    return type(value).__name__


def _show_size(size: Size) -> str:
    if isinstance(size, int):
        return str(size)
    terms = [
        name if factor == 1 else f"{factor}*{name}" if name else str(factor)
        for name, factor in sorted(size.items(), reverse=True)
    ]
    return "+".join(terms)


def _show_arg(arg: object) -> str:
    if isinstance(arg, Node):
        return arg.name
    if isinstance(arg, (tuple, list)):
        inner = ", ".join(_show_arg(a) for a in arg)
        if isinstance(arg, list):
            return f"[{inner}]"
        return f"({inner},)" if len(arg) == 1 else f"({inner})"
    if isinstance(arg, torch.dtype):
        return SHORT[arg]
    if isinstance(arg, torch.device):
        return str(arg)
    return repr(arg)
