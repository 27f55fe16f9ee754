"""A graph holds for the lengths that take its example's branches: what holds elsewhere is traced too.

Export follows the model's Python for one example and notes what it assumed of the sizes: `T <= 64`,
`Ne(Mod(T, 2), 0)`.  A program serves every length up to the compiled one.  So each assumption is tried
at each of them; where one is broken the model is traced again at that length, and refused if its graph
is another one there.  Most that break are torch's own, about strides, and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from dcompile.errors import UnsupportedModel
from dcompile.ir.program import Program
from dcompile.ir.show import target_name
from dcompile.ir.sizes import expression

SHORTEST = 2
"""Export takes sizes of 0 and 1 for special, whatever the model does."""
MOST_TRACES = 8
_LENGTH = sympy.Symbol("T", integer=True, positive=True)
_VIEWS = ("view.default", "_unsafe_view.default", "reshape.default")
_COPIES = ("clone.default", "contiguous.default", "alias.default")


@dataclass(frozen=True)
class Assumption:
    """What export took for granted of the length, in the symbol T, and the line that made it do so."""

    holds: sympy.Basic
    place: str | None

    def broken(self, length: int) -> bool:
        return bool(self.holds.xreplace({_LENGTH: sympy.Integer(length)}) == sympy.false)


class Trace(Protocol):
    """Gives the program of an example of so many positions; of that length alone where `fixed`."""

    def __call__(self, rows: int, fixed: bool = False) -> Program: ...


def check_lengths(program: Program, example: int, trace: Trace) -> None:
    """Raise UnsupportedModel where the model's graph is another one at some length up to the compiled."""
    known = [_assumptions(program, example)]
    for _ in range(MOST_TRACES):
        first = _uncovered(known, program.shape.positions)
        if first is None:
            return
        length, broken = first
        other, assumed = _traced(trace, length)
        if _text(other, length) != _text(program, length):
            raise _refused(broken, length, example)
        known.append(assumed)
    raise _refused(broken, length, example)


def _traced(trace: Trace, length: int) -> tuple[Program, tuple[Assumption, ...]]:
    try:
        other = trace(length)
    except UnsupportedModel:
        # Where a length equals one of the model's sizes, export cannot tell them apart.
        only = Assumption(sympy.Eq(_LENGTH, length), None)
        return trace(length, fixed=True), (only,)
    return other, _assumptions(other, length)


def _refused(broken: Assumption, length: int, example: int) -> UnsupportedModel:
    remedy = "compute both sides and choose with torch.where"
    return UnsupportedModel(
        f"the model takes another branch at {length} positions than at {example}: its graph holds "
        f"only where {broken.holds}",
        where=broken.place,
        remedy=f"{remedy}, or --max-length {length - 1}" if length > example else remedy,
    )


def _uncovered(known: list[tuple[Assumption, ...]], longest: int) -> tuple[int, Assumption] | None:
    """The first length at which every trace has a broken assumption, and the first trace's."""
    if not all(known):
        return None
    for length in range(SHORTEST, longest + 1):
        broken = [next((a for a in one if a.broken(length)), None) for one in known]
        if broken[0] is not None and None not in broken:
            return length, broken[0]
    return None


def _assumptions(program: Program, example: int) -> tuple[Assumption, ...]:
    """Of the length alone: the model sees one sequence, so other sizes are the step's own."""
    length = {s for s, name in program.symbols.items() if name == "R"}
    found: dict[sympy.Basic, Assumption] = {}
    for environment in _environments(program):
        for guard in environment.guards:
            # Sizes that turned out to be equal are one symbol.
            expression = environment.replace(guard.expr)
            if {str(s) for s in expression.free_symbols} <= length and expression.free_symbols:
                holds = expression.xreplace(dict.fromkeys(expression.free_symbols, _LENGTH))
                found.setdefault(holds, Assumption(holds, _place(guard)))
    return tuple(a for a in found.values() if not a.broken(example))


def _environments(program: Program) -> list[ShapeEnv]:
    found = {}
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            found[id(mode.shape_env)] = mode.shape_env
    return list(found.values())


def _place(guard: object) -> str | None:
    """file:line of the model where export noted it, of torch's own where it did not."""
    place = getattr(guard, "sloc", None)
    return None if place is None else str(place).strip("()")


def _text(program: Program, length: int) -> list[str]:
    """What the graph computes at a length, whatever export calls its sizes and wherever it copies."""
    places: dict[Node, str] = {}
    lines: list[str] = []
    for node in program.graph.nodes:
        name = target_name(node) if node.op == "call_function" else node.op
        if name in _COPIES:
            places[node] = places[node.args[0]]
            continue
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            places[node] = _size(value, program, length)
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: places[n])
        if name in _VIEWS:
            name, args = "view", args[:1]
        places[node] = f"%{len(lines)}"
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        sizes = [_size(d, program, length) for d in shape]
        lines.append(f"{name} {sizes} {args} {sorted(kwargs.items())}".replace("'", ""))
    return lines


def _size(size: int | torch.SymInt, program: Program, length: int) -> str:
    known = {s: length if name == "R" else name for s, name in program.symbols.items()}
    found = expression(size)
    return str(found.subs({s: known.get(str(s), s) for s in found.free_symbols}))
