"""What a kernel computes, in the words of the operators: for what a launch of it costs.

Each target has a table of its kernels beside its selectors, `cpu/operands.py` and `cuda/operands.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_OPERAND = re.compile(r"(\w+)(?:=(-|\w+))?(?:\[([^\]]*)\])?$")


@dataclass(frozen=True)
class Operand:
    """An operator's operand, the kernel's argument that holds it, and its shape for the operator."""

    name: str
    argument: str
    """Empty where the kernel has it in no memory: it is fused away, or another launch touches it."""
    shape: tuple[str, ...] | None
    """None where the argument's own shape is meant; else sizes of the kernel, products, or `_`."""


@dataclass(frozen=True)
class Part:
    """An operator that a kernel computes, or the share of it in one launch of several.

        y[_,N] input=x[_,K] weight=w[N,K] bias gate=-[_,N]

    is the operator's name of an operand, the argument's where it differs (`-` where there is none),
    and the shape where the argument's own is another; `_` are as many rows as its elements give.
    """

    operator: str
    operands: str
    share: float = 1
    """Of the operator's FLOPs; its bytes are those of the operands that the launch has."""

    def read(self) -> tuple[Operand, ...]:
        return _read(self.operands)


@cache
def _read(operands: str) -> tuple[Operand, ...]:
    return tuple(map(_operand, operands.split()))


def _operand(text: str) -> Operand:
    found = _OPERAND.match(text)
    assert found is not None, text
    name, argument, shape = found.groups()
    held = "" if argument == "-" else argument or name
    return Operand(name, held, None if shape is None else tuple(shape.split(",")))


@dataclass(frozen=True)
class Kernel:
    """The parts of a kernel, and the arguments that are no operand of any: what it adds, or hands on."""

    parts: tuple[Part, ...]
    beside: str = ""


def one(operator: str, operands: str, beside: str = "", share: float = 1) -> Kernel:
    """A kernel of one part."""
    return Kernel((Part(operator, operands, share),), beside)
