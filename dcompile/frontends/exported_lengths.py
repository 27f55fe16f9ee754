"""Which lengths an exported program holds for: export noted what it assumed, and a caller must keep to it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dcompile.errors import CheckpointError

SHORTEST = 2
# Beyond it no assumption is tried: no sequence that a machine of today decodes is as long.
LONGEST = 1 << 15
MOST_TEXTS, MOST_CHARACTERS = 64, 2000
_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def longest(program: ExportedProgram, where: str) -> int | None:
    """The greatest length up to which all lengths from 2 on keep what export assumed; None for any.

    Raises CheckpointError where some shorter one does not.
    """
    try:
        kept = _parsed([*_range(program), *_guards(program)])
        for length in range(SHORTEST, LONGEST + 1) if kept else ():
            for text, tree in kept:
                if not _value(tree, length):
                    return _ends(length, text, where)
    except (ValueError, SyntaxError, RecursionError) as error:
        what = f"what the exported program assumes of its length cannot be read: {error}"
        raise CheckpointError(what, where=where, remedy="export it with this torch") from error
    return None


def _parsed(texts: list[str]) -> list[tuple[str, ast.expr]]:
    """Raises ValueError for more text than export writes: the file is a stranger's."""
    if len(texts) > MOST_TEXTS or any(len(text) > MOST_CHARACTERS for text in texts):
        raise ValueError("it is too long")
    return [(text, ast.parse(text, mode="eval").body) for text in texts]


def _ends(length: int, text: str, where: str) -> int:
    if length <= SHORTEST:
        raise CheckpointError(
            f"the exported program holds only for lengths where {text}",
            where=where,
            remedy="export it for all lengths: Dim('length', min=2), and no branch on the length",
        )
    return length - 1


def _range(program: ExportedProgram) -> list[str]:
    """The bounds of the length, as comparisons."""
    kinds = {s.arg.name: s.kind for s in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder" and kinds.get(node.name) is InputKind.USER_INPUT:
            sizes = node.meta["val"].shape
            if len(sizes) < 2 or not isinstance(sizes[1], torch.SymInt):
                return []
            bounds = program.range_constraints.get(sizes[1].node.expr)
            if bounds is None:
                return []
            out = [f"T >= {bounds.lower}"] if bounds.lower.is_Integer else []
            return out + ([f"T <= {bounds.upper}"] if bounds.upper.is_Integer else [])
    return []


def _guards(program: ExportedProgram) -> list[str]:
    """What was assumed besides; not every torch that we support keeps it."""
    return [str(text) for text in getattr(program, "_guards_code", None) or ()]


def _value(node: ast.AST, length: int) -> Any:
    """Sizes, whole numbers, comparisons; raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id="T"):
            return length
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(attr="size"), args=[]), slice=ast.Constant(value=axis)
        ) if axis in (0, 1):
            return length if axis == 1 else 1
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, length)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, length)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(v, length) for v in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(v, length) for v in values)
        case ast.BinOp(left=a, op=op, right=b) if type(op) in _BINARY:
            right = _value(b, length)
            if right == 0 and isinstance(op, (ast.FloorDiv, ast.Mod)):
                raise ValueError(ast.unparse(node))
            return _BINARY[type(op)](_value(a, length), right)
        case ast.Compare(left=a, ops=[op], comparators=[b]) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(a, length), _value(b, length))
    raise ValueError(ast.unparse(node))
