"""What native code says of its own kernels, read from the code, so that a plan can be held to it.

A shared object exports `dc_abi`, a text of one line a kernel: its name and its arguments in order.

    linear_f32  >y:f32[R,N] x:f32[R,K] w:f32[{N,K}] bias?:f32[N] residual?:f32[R,N] R N K
    attend_f32  ... row_seq:i64[R]<@N row_limit:i64[R]<=@L ... scale:f

`>` marks what is written, `*` what is changed in place, `?` after a name what may be null. A bare
name is a size, `:f` a number. An extent is a product of sums in the launch's own sizes, `@N @L @n`
those of the plan, `{N,K}` a weight packed in panels; the dtype `?` counts bytes. After it, `<x/D`
bounds the values: they are row numbers of the argument x with rows of D; `=x` says that the values
written are some of x's, `=V` that they are below V. `; K>=1 E%groups` are rules that sizes keep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

PANEL = 32
_PARAMETER = re.compile(
    r"([>*]?)(\w+)(\??):(\w+|\?)(?:\[([^\]]*)\])?(?:(<=?)([^=\s]+))?(?:=(\S+))?$"
)
_RULE = re.compile(r"(\w+)(>=|<=|%)(\w+)$")
_TERM = re.compile(r"([+-]?)([^+-]+)")

Values = Mapping[str, int]
"""A launch's sizes by name, and the plan's as `@N`, `@L`, `@n`."""


@dataclass(frozen=True)
class Parameter:
    """One argument: a buffer, a size or a number."""

    name: str
    kind: str
    """`b`, `i` or `f`, as the plan's arguments are marked."""
    written: bool = False
    read: bool = True
    optional: bool = False
    dtype: str = ""
    extent: str = ""
    below: str = ""
    at_most: bool = False
    values: str = ""
    """Where the values written come from: another argument, or what they are below."""

    def elements(self, sizes: Values) -> int:
        """How many elements the kernel touches; bytes where the dtype is `?`."""
        return prod(_dimension(dim, sizes, self.dtype) for dim in _split(self.extent))


@dataclass(frozen=True)
class Rule:
    left: str
    relation: str
    right: str

    def holds(self, sizes: Values) -> bool:
        a, b = sizes[self.left], _factor(self.right, sizes)
        if self.relation == "%":
            return b > 0 and a % b == 0
        return a >= b if self.relation == ">=" else a <= b

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"


@dataclass(frozen=True)
class Kernel:
    parameters: tuple[Parameter, ...]
    rules: tuple[Rule, ...]


def read_kernels(text: str) -> dict[str, Kernel]:
    """The kernels that a `dc_abi` text describes; raises ValueError where it cannot be read."""
    kernels = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        head, _, tail = line.partition(";")
        name, *parameters = head.split()
        kernels[name] = Kernel(tuple(map(_parameter, parameters)), tuple(map(_rule, tail.split())))
    return kernels


def _parameter(text: str) -> Parameter:
    if text.isidentifier():
        return Parameter(text, "i")
    found = _PARAMETER.match(text)
    if found is None:
        raise ValueError(f"no argument of a kernel: {text!r}")
    mode, name, optional, dtype, extent, relation, below, values = found.groups()
    if dtype == "f" and extent is None:
        return Parameter(name, "f")
    return Parameter(
        name=name,
        kind="b",
        written=bool(mode),
        read=mode != ">",
        optional=bool(optional),
        dtype=dtype,
        extent=extent or "",
        below=below or "",
        at_most=relation == "<=",
        values=values or "",
    )


def _rule(text: str) -> Rule:
    found = _RULE.match(text)
    if found is None:
        raise ValueError(f"no rule of a kernel: {text!r}")
    return Rule(*found.groups())


def _split(extent: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|[^,]+", extent)


def _dimension(text: str, sizes: Values, dtype: str) -> int:
    if text.startswith("{"):
        n, k = (_sum(part, sizes) for part in text[1:-1].split(","))
        # As dcompile/codegen/pack.py packs: panels of 32 rows, an odd K of bf16 padded.
        return -(-n // PANEL) * PANEL * (k + k % (2 if dtype == "bf16" else 1))
    return _sum(text, sizes)


def _sum(text: str, sizes: Values) -> int:
    total = 0
    for sign, term in _TERM.findall(text):
        value = prod(_factor(factor, sizes) for factor in term.split("*"))
        total += -value if sign == "-" else value
    return total


def _factor(text: str, sizes: Values) -> int:
    return int(text) if text.isdecimal() else sizes[text]
