"""One specialised kernel as data, and what a family answers when asked how an operator is launched.

Nothing here needs Triton or torch, so that plans, emitters and compile workers can all read it.

An operator's family module has a plain function `launches(...)` that takes the operator's shape and
returns a `Lowering`: the steps in order, and the scratch memory that they share.  Each step binds
every argument of its kernel: to an argument or result of the operator, to scratch, or to a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

# A size as data, what a JSON plan holds: 7; {"R": 64, "": 7} for 64 R + 7; or one of
# {"cdiv": [a, 16]}, {"min": [a, b]}, {"max": [a, b]}, {"sum": [a, b, ...]}, {"mul": [a, b, ...]}.
Expression = int | Mapping[str, Any]

DType = Literal["f32", "bf16", "f16", "i64", "i32", "u8", "bool"]

# What Triton calls the dtypes of docs/formats.md.
TRITON_TYPES: Mapping[str, str] = {
    "f32": "fp32",
    "bf16": "bf16",
    "f16": "fp16",
    "i64": "i64",
    "i32": "i32",
    "u8": "u8",
    "bool": "i1",
}
ITEM_BYTES: Mapping[str, int] = {
    **{"f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "u8": 1, "bool": 1},
}

# A compile-time value; text names a device function, as "module:function", and nothing else.
ConstantValue = int | float | bool | str | None


@dataclass(frozen=True)
class Parameter:
    """A run-time argument of a kernel: `*bf16` is a pointer, `i32` and `fp32` are scalars."""

    name: str
    type: str
    aligned: bool = False  # a pointer or integer that is a multiple of 16

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that its binary depends on, but for the architecture.

    `arguments` are the parameters that are passed at launch, in the kernel's order; every other
    parameter has a value in `constants` (None for a pointer that is absent).  `grid` may name the
    symbols R (rows) and B (sequences).
    """

    name: str  # moe_ffn_gate_up_silu_e64k8_bf16: unique in a plan, stable between runs
    kernel: str  # "module:function"
    arguments: tuple[Parameter, ...]
    constants: tuple[tuple[str, ConstantValue], ...]
    grid: tuple[Expression, Expression, Expression]
    num_warps: int
    num_stages: int

    def __hash__(self) -> int:
        return hash(self.name)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(text: Mapping[str, Any]) -> Variant:
        return Variant(
            name=text["name"],
            kernel=text["kernel"],
            arguments=tuple(Parameter(**p) for p in text["arguments"]),
            constants=tuple((name, value) for name, value in text["constants"]),
            grid=tuple(text["grid"]),
            num_warps=text["num_warps"],
            num_stages=text["num_stages"],
        )


@dataclass(frozen=True)
class Operand:
    """A tensor of the operator, under the name that its family's `launches` documents."""

    name: str


@dataclass(frozen=True)
class Temporary:
    """A scratch tensor of the lowering, by its name."""

    name: str


@dataclass(frozen=True)
class Number:
    """A scalar: an integer (an expression of R and B) or a float."""

    value: Expression | float


Binding = Operand | Temporary | Number


@dataclass(frozen=True)
class Scratch:
    """Memory that the steps of one lowering hand to each other.

    `zeroed` memory must be zero before its first use; every launch leaves it zero again, so that
    all lowerings of a plan may share one such buffer, as large as the largest.
    """

    name: str
    dtype: DType
    elements: Expression
    zeroed: bool = False

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Step:
    """One launch: a variant, and what each of its arguments is."""

    variant: Variant
    bindings: tuple[Binding, ...]

    def __post_init__(self) -> None:
        assert len(self.bindings) == len(self.variant.arguments), self.variant.name


@dataclass(frozen=True)
class Lowering:
    """How an operator is computed: launches in order, over its operands and this scratch."""

    steps: tuple[Step, ...]
    scratch: tuple[Scratch, ...] = ()


def evaluate(expression: Expression, symbols: Mapping[str, int]) -> int:
    """The value of an expression for given R and B."""
    if isinstance(expression, int):
        return expression
    for name, operands in expression.items():
        if name in ("cdiv", "min", "max", "sum", "mul"):
            return _apply(name, [evaluate(o, symbols) for o in operands])
    return sum(factor * (symbols[name] if name else 1) for name, factor in expression.items())


def _apply(operator: str, values: Sequence[int]) -> int:
    if operator == "cdiv":
        return -(-values[0] // values[1])
    if operator == "mul":
        return prod(values)
    if operator == "sum":
        return sum(values)
    return min(values) if operator == "min" else max(values)


def pointer(name: str, dtype: str) -> Parameter:
    """A pointer to a buffer of its own: buffers start at multiples of 64 bytes."""
    return Parameter(name, "*" + TRITON_TYPES[dtype], aligned=True)


def unaligned(variant: Variant, names: frozenset[str]) -> Variant:
    """`variant` for arguments that start anywhere, such as a column slice of another buffer."""
    arguments = tuple(
        replace(p, aligned=p.aligned and p.name not in names) for p in variant.arguments
    )
    return replace(variant, name=f"{variant.name}_unaligned", arguments=arguments)
