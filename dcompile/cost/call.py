"""One launch of a plan: its arguments by the kernel's names, and its operands by the operator's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.codegen.cpu.build import library_abi
from dcompile.codegen.cpu.operands import KERNELS as CPU_KERNELS
from dcompile.codegen.cuda.operands import KERNELS as CUDA_KERNELS
from dcompile.codegen.operands import Kernel, Operand, Part
from dcompile.ir.work import Extent, Operands, Touched
from dcompile.runtime.cpu.abi import read_kernels
from dcompile.runtime.expressions import Expression
from dcompile.runtime.weights import DTYPES

Plan = Mapping[str, Any]
Launch = Mapping[str, Any]
Ints = npt.NDArray[np.int64]
STORED = ("weight", "constant")
ROUTERS = ("route", "route_limited")
CHOICES = ("vocab_choice", "vocab_choice_asked")
MIXTURES = ("soft_embed", "vocab_soft_embed")
_SUFFIXES = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Facts:
    """What one iteration ran over: keys seen and slot of each row, and what its launches chose."""

    R: int
    B: int
    limits: Ints
    sequences: Ints
    chosen: Ints | None
    experts: Mapping[int, Ints]
    """Launch that routed -> experts [rows, k]."""
    live: Mapping[int, int]
    """Launch that chooses tokens -> candidates that were still undecided."""

    def keys(self, rows: int) -> tuple[int, int]:
        """Keys seen by all rows together, and keys that memory gives: each slot's once.

        An attention over fewer rows than the step's is over those that choose tokens.
        """
        limits, sequences = self.limits, self.sequences
        if rows != self.R and self.chosen is not None:
            limits, sequences = limits[self.chosen], sequences[self.chosen]
        read = sum(int(limits[sequences == slot].max()) for slot in np.unique(sequences))
        return int(limits.sum()), read


class Call:
    """One launch with its sizes evaluated; `routed` is the launch that chose the experts it reads."""

    def __init__(self, plan: Plan, at: int, facts: Facts, routed: int | None = None) -> None:
        self.plan, self.at, self.facts, self.routed = plan, at, facts, routed
        self.launch = plan["launches"][at]
        self.sizes = [self._evaluate(a["i"]) for a in self.flat() if "i" in a]
        self.named = named_arguments(self.launch)
        self.kernel = kernel_of(self.launch)

    def parts(self) -> Iterator[tuple[Part, Operands]]:
        """What the launch computes, and over what; nothing for a function printed for one plan."""
        if self.kernel is None:
            return
        rows = self._rows(self.kernel)
        for part in self.kernel.parts:
            found = ((operand.name, self._extent(operand, rows)) for operand in part.read())
            yield part, Operands({name: extent for name, extent in found if extent is not None})

    def beside(self) -> int:
        """Bytes of the arguments that are no operand."""
        assert self.kernel is not None
        held = (self._buffer(name) for name in self.kernel.beside.split())
        return sum(self.bytes(buffer) for buffer in held if buffer is not None)

    def touched(self, part: Part, of: Operands) -> Touched:
        """What the iteration ran over of a part's operands, as far as somebody looked."""
        facts = self.facts
        if part.operator == "attend":
            seen, read = facts.keys(of["o"].shape[0])
            return Touched(fresh=facts.R, seen=seen, read=read)
        if part.operator in CHOICES:
            return Touched(live=facts.live.get(self.at))
        if part.operator in MIXTURES:
            # How many rows are still masks is not looked at: those that choose tokens, at least.
            return Touched(live=sum(facts.live.values()) if facts.live else None)
        chosen = None if self.routed is None else facts.experts.get(self.routed)
        if part.operator != "moe_ffn" or chosen is None:
            return Touched()
        there = chosen[chosen >= 0]
        rows, choices = of["experts"].shape
        shared = choices - chosen.shape[1]
        return Touched(experts=len(np.unique(there)) + shared, slots=there.size + rows * shared)

    def looked_at(self) -> int | None:
        """Experts that a look at the router found."""
        chosen = None if self.routed is None else self.facts.experts.get(self.routed)
        return None if chosen is None else len(np.unique(chosen[chosen >= 0]))

    def flat(self) -> Iterator[dict[str, Any]]:
        return (arg for arg in flat_arguments(self.launch) if isinstance(arg, dict))

    def buffers(self) -> list[int]:
        """Every buffer once, written ones among them."""
        read = [arg["b"] for arg in self.flat() if arg.get("b") is not None]
        return list(dict.fromkeys([*read, *(w for w in self.launch["writes"] if w is not None)]))

    def shape(self, buffer: int) -> list[int]:
        return [self._evaluate(size) for size in self.plan["buffers"][buffer]["shape"]]

    def kind(self, buffer: int) -> str:
        return str(self.plan["buffers"][buffer]["place"]["kind"])

    def elements(self, buffer: int) -> int:
        return prod(self.shape(buffer))

    def itemsize(self, buffer: int) -> int:
        return DTYPES[self.plan["buffers"][buffer]["dtype"]].itemsize

    def bytes(self, buffer: int) -> int:
        """Of the tensor as the plan has it, whatever its layout."""
        return self.elements(buffer) * self.itemsize(buffer)

    def _evaluate(self, size: Any) -> int:
        return Expression(size)(self.facts.R, self.facts.B)

    def _buffer(self, name: str) -> int | None:
        found: int | None = self.named[name]["b"] if name in self.named else None
        return found

    def _size(self, name: str) -> int:
        if name in self.named:
            return self._evaluate(self.named[name]["i"])
        return int(self.launch["constants"][name])

    def _dimension(self, text: str, rows: int) -> int:
        factors = (f for f in text.split("*"))
        return prod(
            rows if f == "_" else int(f) if f.isdecimal() else self._size(f) for f in factors
        )

    def _rows(self, kernel: Kernel) -> int:
        """What `_` stands for, by the first argument that says it."""
        for part in kernel.parts:
            for operand in part.read():
                buffer = self._buffer(operand.argument)
                if buffer is not None and operand.shape is not None and "_" in operand.shape:
                    width = prod(self._dimension(d, 1) for d in operand.shape)
                    return self.elements(buffer) // width
        return 0

    def _extent(self, operand: Operand, rows: int) -> Extent | None:
        """None where an argument is absent, as a bias may be."""
        named = tuple(self._dimension(d, rows) for d in operand.shape or ())
        if not operand.argument:
            return Extent(named, 0)
        buffer = self._buffer(operand.argument)
        if buffer is None:
            return None
        shape = tuple(self.shape(buffer)) if operand.shape is None else named
        if self.kind(buffer) in STORED:
            return Extent(shape, self.bytes(buffer))
        return Extent(shape, prod(shape) * self.itemsize(buffer))


def kernel_of(launch: Launch) -> Kernel | None:
    """What a launch's kernel computes; None for ATen's and for a function printed for one plan."""
    if "function" in launch:
        return CUDA_KERNELS.get(launch["function"])
    return CPU_KERNELS.get(family(launch["kernel"])) if named_arguments(launch) else None


def named_arguments(launch: Launch) -> Mapping[str, Any]:
    """A launch's arguments by the names that its kernel has for them."""
    if "named" in launch:
        named: Mapping[str, Any] = launch["named"]
        return named
    names = _library().get(launch["kernel"], ()) if launch["where"] == "native" else ()
    # Code of another version may have a kernel of this name with other arguments.
    known = len(names) == len(launch["args"])
    return dict(zip(names, launch["args"], strict=True)) if known else {}


@cache
def _library() -> Mapping[str, tuple[str, ...]]:
    """The CPU library's kernels, with the names of their arguments."""
    kernels = read_kernels(library_abi())
    return {name: tuple(p.name for p in kernel.parameters) for name, kernel in kernels.items()}


def family(kernel: str) -> str:
    """linear_bf16 -> linear"""
    stem, _, end = kernel.rpartition("_")
    return stem if end in _SUFFIXES else kernel


def flat_arguments(launch: Launch) -> Iterator[Any]:
    waiting = [*launch["args"], *launch.get("kwargs", {}).values()]
    while waiting:
        arg = waiting.pop(0)
        if isinstance(arg, list):
            waiting = [*arg, *waiting]
        else:
            yield arg
