"""A launch from its parts: every argument is declared once, beside what it is bound to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcompile.codegen.triton.variant import (
    Binding,
    ConstantValue,
    Expression,
    Number,
    Operand,
    Parameter,
    Step,
    Temporary,
    Variant,
    pointer,
)

PACKAGE = "dcompile.codegen.kernels"  # of the kernels themselves; artifacts name them so


@dataclass(frozen=True)
class Argument:
    """A kernel's parameter and what is passed for it; None where the tensor is absent."""

    parameter: Parameter
    binding: Binding | None


def operand(name: str, dtype: str, present: bool = True, called: str | None = None) -> Argument:
    """A tensor of the operator; `called` is its name there where it differs from the kernel's."""
    return Argument(pointer(name, dtype), Operand(called or name) if present else None)


def temporary(name: str, dtype: str, present: bool = True) -> Argument:
    return Argument(pointer(name, dtype), Temporary(name) if present else None)


def count(name: str, value: Expression) -> Argument:
    """A run-time integer, such as the number of rows."""
    return Argument(Parameter(name, "i32"), Number(value))


@dataclass(frozen=True)
class Shape:
    """How a variant is laid over the machine."""

    grid: tuple[Expression, Expression, Expression]
    warps: int = 4
    stages: int = 2


def assemble(
    name: str,
    kernel: str,
    arguments: Sequence[Argument],
    constants: Mapping[str, ConstantValue],
    shape: Shape,
) -> Step:
    """One launch of `kernel` ("family:function" of this package)."""
    present = [(a.parameter, a.binding) for a in arguments if a.binding is not None]
    absent = {a.parameter.name: None for a in arguments if a.binding is None}
    variant = Variant(
        name=name,
        kernel=f"{PACKAGE}.{kernel}",
        arguments=tuple(parameter for parameter, _ in present),
        constants=tuple({**absent, **constants}.items()),
        grid=shape.grid,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return Step(variant, tuple(binding for _, binding in present))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n (and at least `least`)."""
    return max(least, 1 << max(0, n - 1).bit_length())
