"""Sizes that are affine in the symbols R and B, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcompile.errors import DataDependentShape, UnsupportedModel

if TYPE_CHECKING:  # what only evaluates sizes needs neither
    import sympy
    import torch

    Dim = int | torch.SymInt

Size = int | dict[str, int]  # 7, or {"R": 64, "": 7} for 64 R + 7


def expression(dim: Dim) -> sympy.Expr:
    import sympy

    return sympy.Integer(dim) if isinstance(dim, int) else dim.node.expr


def is_static(dim: Dim) -> bool:
    return isinstance(dim, int) or bool(expression(dim).is_number)


def size_of(dim: Dim, symbols: dict[str, str]) -> Size:
    """A dimension as data; raises where it is not affine in the program's symbols."""
    if isinstance(dim, int):
        return dim
    expr = dim.node.expr
    if expr.is_Symbol and str(expr) in symbols:
        return {symbols[str(expr)]: 1}
    expr = expr.expand()
    if expr.is_number:
        return int(expr)
    out: dict[str, int] = {}
    for term, factor in expr.as_coefficients_dict().items():
        name = "" if term == 1 else symbols.get(str(term))
        if name is None:
            if any(str(s).startswith("u") for s in term.free_symbols):
                raise DataDependentShape(
                    f"the step has a shape that only the data knows: {expr}",
                    remedy="keep shapes static; select rows with masks instead of nonzero()",
                )
            raise UnsupportedModel(f"a size is not a multiple of the number of rows: {expr}")
        out[name] = int(factor)
    return out


def elements(shape: list[Size]) -> Size:
    """The product of sizes of which at most one depends on a symbol."""
    factor, moving = 1, None
    for size in shape:
        if isinstance(size, int):
            factor *= size
        elif moving is None:
            moving = size
        else:
            raise UnsupportedModel("a tensor has two axes of unknown size")
    if moving is None:
        return factor
    return {name: value * factor for name, value in moving.items()}


def evaluate(size: Size, values: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return sum(factor * (values[name] if name else 1) for name, factor in size.items())


def shape_of(value: torch.Tensor, symbols: dict[str, str]) -> list[Size]:
    return [size_of(dim, symbols) for dim in value.shape]
