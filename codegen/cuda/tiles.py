"""Values of an emitted kernel: index expressions, the tiles that they span, and how they are read.

A program of an emitted kernel owns one index of the group's leading axis, `i0`. What is left of a
value's shape, without axes of size 1, is its tile: one power of two an axis, masked where that is
more than there is. A domain is the tile that a line of the kernel computes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from dcompile.codegen.triton.assemble import power_of_two
from dcompile.ir.sizes import Size

LIMIT = 8192  # elements of a tile that is held in registers
CHUNK = 1024  # elements of one turn of a loop over more

KINDS = {"float": "tl.float32", "double": "tl.float64", "int": "tl.int64", "bool": "tl.int1"}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def kind_of(dtype: torch.dtype) -> str:
    """In what an element is computed: halves in float32, integers in int64."""
    if dtype == torch.bool:
        return "bool"
    if dtype == torch.float64:
        return "double"
    return "float" if dtype.is_floating_point else "int"


@dataclass(frozen=True)
class Text:
    """An expression: its text, what it is computed in, and the axes of the domain that it spans."""

    text: str
    kind: str
    axes: frozenset[int] = frozenset()

    def to(self, kind: str) -> Text:
        if kind == self.kind:
            return self
        if kind == "bool":
            return Text(f"({self.text} != 0)", kind, self.axes)
        if self.kind == "literal":
            return literal(float(self.text) if kind in ("float", "double") else self.text, kind)
        return Text(f"({self.text}).to({KINDS[kind]})", kind, self.axes)


def join(*texts: Text) -> frozenset[int]:
    return frozenset().union(*(t.axes for t in texts))


def literal(x: object, kind: str) -> Text:
    """A number, or its text, as the text of a kernel."""
    assert isinstance(x, (int, float, str)), f"not a number: {x!r}"
    if kind == "bool":
        return Text(str(bool(x)), kind)
    if kind == "int":
        return Text(str(int(x)), kind)
    number = float(x)
    special = number != number or number in (float("inf"), float("-inf"))
    return Text(f'float("{number}")' if special else repr(number), kind)


ZERO, ROW = Text("0", "index"), Text("i0", "index")


@dataclass(frozen=True)
class Domain:
    """What a line computes over: axes with their names and sizes, and the mask of what is real.

    In a looped domain the last axis is a run of CHUNK of a longer one.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    padded: tuple[int, ...]
    looped: bool = False

    def axis(self, i: int) -> Text:
        return Text(self.names[i], "index", frozenset([i]))

    @property
    def mask(self) -> Text | None:
        """None where every element is real."""
        short = [
            i
            for i, (n, p) in enumerate(zip(self.sizes, self.padded, strict=True))
            if (n % p if self.looped and i == len(self.sizes) - 1 else n != p)
        ]
        if not short:
            return None
        words = [f"({self.names[i]} < {self.sizes[i]})" for i in short]
        return Text(" & ".join(words), "bool", frozenset(short))

    def whole(self, x: Text) -> str:
        """The expression's text, spread over all axes."""
        if len(x.axes) == len(self.names):
            return x.text
        return f"tl.broadcast_to({x.text}, [{', '.join(map(str, self.padded))}])"


def tile_of(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(power_of_two(n) for n in shape)


def fits(shape: Iterable[int]) -> bool:
    return prod(tile_of(shape)) <= LIMIT


def size_text(size: Size) -> str:
    """A size as the text of a kernel; R and B are its arguments."""
    if isinstance(size, int):
        return str(size)
    terms = [f"{factor} * {name}" if name else str(factor) for name, factor in size.items()]
    text = " + ".join(t.removeprefix("1 * ") for t in terms)
    return text if len(terms) == 1 and "*" not in text else f"({text})"


def linear(index: list[Text], shape: list[Size]) -> Text:
    """The place of an element in row-major order."""
    text, axes = "", frozenset[int]()
    for i, size in zip(index, shape, strict=True):
        axes |= i.axes
        if not text or text == "0":
            text = i.text
        elif i.text == "0":
            text = f"{_factor(text)} * {size_text(size)}" if size != 1 else text
        else:
            text = f"{_factor(text)} * {size_text(size)} + {i.text}" if size != 1 else text
    return Text(text or "0", "index", axes)


def _factor(text: str) -> str:
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def split(place: Text, shape: list[Size]) -> list[Text]:
    """The index of the element at a place in row-major order."""
    out = []
    for d in range(len(shape)):
        inner = _product(shape[d + 1 :])
        text = _factor(place.text) if inner == "1" else f"{_factor(place.text)} // {inner}"
        outer = d == 0 or all(s == 1 for s in shape[:d])
        text = text if outer else f"({text}) % {size_text(shape[d])}"
        out.append(ZERO if shape[d] == 1 else Text(f"({text})", "index", place.axes))
    return out


def _product(shape: list[Size]) -> str:
    fixed = prod(s for s in shape if isinstance(s, int))
    moving = [size_text(s) for s in shape if not isinstance(s, int)]
    words = [*([str(fixed)] if fixed != 1 or not moving else []), *moving]
    return words[0] if len(words) == 1 else f"({' * '.join(words)})"


def reshaped(index: list[Text], new: list[Size], old: list[Size]) -> list[Text]:
    """The index in the old shape of an element of the new one."""
    kept = [(i, s) for i, s in zip(index, new, strict=True) if s != 1]
    if [s for _, s in kept] == [s for s in old if s != 1]:
        left = iter(i for i, _ in kept)
        return [ZERO if s == 1 else next(left) for s in old]
    return split(linear(index, new), old)


def register(name: str, axes: tuple[int, ...], rank: int) -> str:
    """A tile with axes `axes` of a domain of `rank` axes, placed so that it broadcasts."""
    if not axes or axes == tuple(range(rank)):
        return name
    return f"{name}[{', '.join(':' if a in axes else 'None' for a in range(rank))}]"


def axis_numbers(index: list[Text], domain: Domain) -> tuple[int, ...] | None:
    """The axes that an index is made of, in ascending order; None where it is anything else."""
    names: Mapping[str, int] = {name: i for i, name in enumerate(domain.names)}
    if any(i.text not in names for i in index):
        return None
    found = tuple(names[i.text] for i in index)
    return found if list(found) == sorted(set(found)) else None
