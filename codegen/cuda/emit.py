"""What no kernel family computes, as Triton: one kernel for a run of small operators.

A program owns one index of the leading axis that the operators share (a row, a sequence), and holds
their values for it in registers, a line of the kernel for a node of the graph. Larger values, and
those that are read at other places than their own, go through memory behind a barrier.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
from torch.fx import Node

from dcompile.codegen.cuda.pointwise import FUNCTIONS, element, is_pointwise
from dcompile.codegen.cuda.ranking import SORTS, can_sort, emit_sort
from dcompile.codegen.cuda.tiles import (
    CHUNK,
    LIMIT,
    ROW,
    TYPES,
    ZERO,
    Domain,
    Text,
    axis_numbers,
    fits,
    kind_of,
    linear,
    register,
    reshaped,
    tile_of,
)
from dcompile.codegen.triton.assemble import power_of_two
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.show import show_node
from dcompile.ir.sizes import Size, shape_of

aten = torch.ops.aten
RESHAPE = aten.reshape.default
# name: (identity, of two tiles, along an axis)
REDUCE = {
    aten.sum.dim_IntList: ("0", "{0} + {1}", "tl.sum({0}, {1})"),
    aten.mean.dim: ("0", "{0} + {1}", "tl.sum({0}, {1})"),
    aten.amax.default: ("LOWEST", "most({0}, {1})", "tl.max({0}, {1})"),
    aten.amin.default: ("HIGHEST", "least({0}, {1})", "tl.min({0}, {1})"),
    aten.any.dim: ("0", "tl.maximum({0}, {1})", "tl.max({0}, {1})"),
    aten.all.dim: ("1", "tl.minimum({0}, {1})", "tl.min({0}, {1})"),
}
EXTREME = {aten.amax.default: "maximum", aten.amin.default: "minimum"}
SCATTERS = (aten.index_put.default, operators.WRITE_ROWS)
GATHERS = (
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
)
MOVES = (aten.slice.Tensor, aten.permute.default, aten.cat.default, RESHAPE)


def can_emit(node: Node) -> bool:
    """Whether this module can print the node."""
    if node.target in SORTS:
        return can_sort(node)
    if node.target is operator.getitem:
        return node.args[0].target in SORTS
    if not isinstance(node.meta.get("val"), torch.Tensor) or value(node).dtype not in TYPES:
        return False
    target = node.target
    if target in REDUCE:
        return isinstance(node.args[1], (list, tuple, int))
    if target is aten.index.Tensor:
        indices = node.args[1]
        return all(i is not None and value(i).dtype == torch.int64 for i in indices)
    if target in SCATTERS:
        accumulate = target is aten.index_put.default and len(node.args) > 3 and node.args[3]
        return (
            not accumulate and isinstance(node.args[0], Node) and node.args[0].op == "placeholder"
        )
    if target is aten.slice.Tensor:
        return len(node.args) == 4 or (len(node.args) == 5 and node.args[4] == 1)
    return target in GATHERS or target in MOVES or is_pointwise(node)


def base(node: Node) -> Node:
    """What is in memory behind a reshape."""
    while node.target is RESHAPE:
        node = node.args[0]
    return node


def lead_axis(shape: list[Size]) -> int | None:
    """The axis whose index a program owns: the one that moves, else the first of more than one."""
    moving = [d for d, size in enumerate(shape) if not isinstance(size, int)]
    if moving:
        return moving[0]
    return next((d for d, size in enumerate(shape) if size != 1), None)


def lead_of(node: Node, program: Program) -> Size:
    """How many programs a group with this node has: nodes of one group agree on it."""
    shape = work_shape(node, program)
    axis = lead_axis(shape)
    return 1 if axis is None else shape[axis]


def work_shape(node: Node, program: Program) -> list[Size]:
    """The shape over which a node's group is laid out: its own, or that of what it writes."""
    if node.target in SCATTERS:
        rows = node.args[1] if node.target is operators.WRITE_ROWS else node.args[2]
        return shape_of(value(rows), program.symbols)
    if node.target in SORTS:
        return shape_of(value(node.args[0]), program.symbols)
    return shape_of(value(node), program.symbols)


class Split(Exception):
    """A node reads, of a value of its own group, what another program computes."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


class _Keep(Exception):
    """A value has to go through memory."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass
class Emitted:
    """A kernel's source, and what it is launched over."""

    body: str  # without the line that names it
    buffers: dict[Node, str]  # value -> parameter, in order
    symbols: list[str]  # R and B, those that it needs
    stored: list[Node]
    updated: list[Node]  # states changed in place
    programs: Size
    warps: int
    imports: set[str] = field(default_factory=set)


def emit(program: Program, nodes: list[Node], needed: set[Node]) -> Emitted:
    """The kernel of a group; `needed` are the nodes that are read outside it.  Raises Split."""
    kept = set(needed)
    while True:
        try:
            return _Emitter(program, nodes, kept).run()
        except _Keep as wanted:
            assert wanted.node not in kept, f"{wanted.node.name} is kept and is not found"
            kept.add(wanted.node)


class _Emitter:
    def __init__(self, program: Program, nodes: list[Node], kept: set[Node]) -> None:
        self.program, self.nodes, self.kept = program, nodes, kept
        self.inside = set(nodes)
        self.lines: list[str] = []
        self.buffers: dict[Node, str] = {}
        self.held: dict[Node, str] = {}  # the name of its tile
        self.domains: dict[tuple[int, ...], Domain] = {}
        self.loaded: dict[str, str] = {}  # of other kernels' values: what was loaded -> its name
        self.behind: set[Node] = set()  # in memory, but not yet behind a barrier
        self.stored: list[Node] = []
        self.updated: list[Node] = []
        self.largest = 32
        self.current = nodes[0]

    def run(self) -> Emitted:
        for node in self.nodes:
            self.current = node
            if node.target is operator.getitem or (node.target in MOVES and node not in self.kept):
                continue
            self.lines.append(f"# {show_node(node, self.program)}")
            if node.target in SCATTERS:
                self._scatter(node)
            elif node.target in SORTS:
                emit_sort(self, node)
            elif node.target in REDUCE:
                self._reduce(node)
            elif fits(self.inner(node)):
                self._tile(node)
            elif node in self.kept or self._readers(node) != 1:
                self._loop(node)
            else:
                self.lines.pop()  # printed where it is read
        text = "\n".join(f"    {line}" for line in self.lines)
        symbols = [s for s in ("R", "B") if _mentions(text, s)]
        rows = lead_of(self.nodes[0], self.program)
        head = "    i0 = tl.program_id(0).to(tl.int64)\n" if _mentions(text, "i0") else ""
        warps = max(1, min(8, power_of_two(self.largest) // 512))
        used = {name for name in (*FUNCTIONS, "most", "least") if f"{name}(" in text}
        return Emitted(
            head + text + "\n", self.buffers, symbols, self.stored, self.updated, rows, warps, used
        )

    # Where values are.

    def shape(self, node: Node) -> list[Size]:
        return shape_of(value(node), self.program.symbols)

    def lead(self, shape: list[Size]) -> int | None:
        """The axis of a shape that is the group's own."""
        wanted = lead_of(self.nodes[0], self.program)
        axis = lead_axis(shape)
        return axis if axis is not None and wanted != 1 and shape[axis] == wanted else None

    def inner(self, node: Node) -> tuple[int, ...]:
        """The axes of a node's tile: all but the leading one and those of size 1."""
        shape = self.shape(node)
        lead = self.lead(shape)
        return tuple(int(s) for d, s in enumerate(shape) if d != lead and s != 1)

    def pointer(self, node: Node) -> str:
        return self.buffers.setdefault(node, f"p{len(self.buffers)}")

    def domain(self, sizes: tuple[int, ...]) -> Domain:
        if sizes not in self.domains:
            padded = tile_of(sizes)
            self.largest = max(self.largest, prod(padded))
            label = "x".join(map(str, sizes))
            names = tuple(
                f"a{label}_{i}" if len(sizes) > 1 else f"a{label}" for i in range(len(sizes))
            )
            for i, name in enumerate(names):
                spread = ", ".join(":" if i == d else "None" for d in range(len(sizes)))
                tail = f"[{spread}]" if len(sizes) > 1 else ""
                self.lines.insert(0, f"{name} = tl.arange(0, {padded[i]}){tail}")
            self.domains[sizes] = Domain(names, sizes, padded)
        return self.domains[sizes]

    def index(self, shape: list[Size], domain: Domain) -> list[Text]:
        """The index of the domain's element in a shape whose inner axes are the domain's."""
        lead = self.lead(shape)
        axes = iter(range(len(domain.names)))
        return [
            ROW if d == lead else ZERO if size == 1 else domain.axis(next(axes))
            for d, size in enumerate(shape)
        ]

    def load(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text:
        """The element of a value at an index."""
        if node.target is RESHAPE:
            if base(node) in self.inside:
                return self.moved(node, index, domain, mask)
            # In memory the places are the same.
            return self._from_memory(base(node), linear(index, self.shape(node)), domain, mask)
        if node in self.held:
            name = self.held[node]
            shape = self.shape(node)
            lead = self.lead(shape)
            if lead is not None and index[lead] != ROW:
                raise Split(self.current)
            own = [i for d, i in enumerate(index) if d != lead and shape[d] != 1]
            axes = axis_numbers(own, domain)
            run = len(domain.names) - 1 if domain.looped else None
            sizes = None if axes is None or run in axes else tuple(domain.sizes[a] for a in axes)
            if sizes == self.inner(node):
                text = register(name, axes, len(domain.names))
                return Text(text, kind_of(value(node).dtype), frozenset(axes))
        if node in self.inside and node.target in MOVES and node not in self.stored:
            return self.moved(node, index, domain, mask)
        if node in self.inside and node.target in SCATTERS:
            raise Split(self.current)
        if node in self.inside and node not in self.stored:
            if node in self.held or node.target in REDUCE or node.target in SORTS:
                raise _Keep(node)
            return self.compute(node, index, domain, mask)
        if node in self.inside:
            lead = self.lead(self.shape(node))
            if lead is not None and index[lead] != ROW:
                raise Split(self.current)
            if node in self.behind:
                self.lines.append("tl.debug_barrier()")
                self.behind.clear()
        return self._from_memory(node, linear(index, self.shape(node)), domain, mask)

    def _from_memory(self, node: Node, place: Text, domain: Domain, mask: Text | None) -> Text:
        pointer = (
            f"{self.pointer(node)} + {place.text}" if place.text != "0" else self.pointer(node)
        )
        masked = f", mask={mask.text}, other=0" if mask is not None and place.axes else ""
        axes = place.axes | (mask.axes if masked and mask is not None else frozenset())
        dtype = value(node).dtype
        kind = kind_of(dtype)
        wide = {"float": torch.float32, "int": torch.int64}.get(kind, dtype)
        cast = "" if wide == dtype else f".to(tl.{'float32' if kind == 'float' else 'int64'})"
        text = f"tl.load({pointer}{masked}){cast}"
        if node not in self.inside and not domain.looped:
            if text not in self.loaded:
                self.loaded[text] = f"u{len(self.loaded)}"
                self.lines.append(f"{self.loaded[text]} = {text}")
            text = self.loaded[text]
        return Text(text, kind, axes)

    def store(self, node: Node, text: str, index: list[Text], mask: Text | None) -> None:
        """A value at its own place; others may read it after a barrier."""
        place = linear(index, self.shape(node))
        pointer = self.pointer(node)
        where = f"{pointer} + {place.text}" if place.text != "0" else pointer
        masked = f", mask={mask.text}" if mask is not None else ""
        self.lines.append(f"tl.store({where}, {text}{masked})")
        self.note_stored(node)

    def note_stored(self, node: Node) -> None:
        self.stored.append(node)
        self.behind.add(node)

    def stored_text(self, node: Node, text: str) -> str:
        """A value in its own dtype."""
        name = TYPES[value(node).dtype]
        if name in ("fp32", "i64", "i1", "fp64"):
            return text
        long = {"bf16": "bfloat16", "fp16": "float16", "u8": "uint8"}.get(name, f"int{name[1:]}")
        return f"{text}.to(tl.{long})"

    # What values are.

    def compute(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text:
        """The element of a node at an index, from its arguments."""
        if node.target in MOVES:
            return self.moved(node, index, domain, mask)
        if node.target in GATHERS:
            return self.gathered(node, index, domain, mask)
        shape = self.shape(node)

        def read(argument: Node) -> Text:
            return self.spread(argument, index, shape, domain, mask)

        return element(node, read)

    def spread(
        self, node: Node, index: list[Text], shape: list[Size], domain: Domain, mask: Text | None
    ) -> Text:
        """The element of `node`, broadcast to `shape`."""
        own = self.shape(node)
        tail, sizes = index[len(index) - len(own) :], shape[len(shape) - len(own) :]
        place = [
            ZERO if s == 1 and whole != 1 else i
            for s, whole, i in zip(own, sizes, tail, strict=True)
        ]
        return self.load(node, place, domain, mask)

    def moved(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text:
        source = node.args[0]
        if node.target is RESHAPE:
            place = reshaped(index, self.shape(node), self.shape(source))
            return self.load(source, place, domain, mask)
        if node.target is aten.permute.default:
            back = [ZERO] * len(index)
            for i, d in enumerate(node.args[1]):
                back[d] = index[i]
            return self.load(source, back, domain, mask)
        if node.target is aten.slice.Tensor:
            dim, start = node.args[1], node.args[2]
            moved = [_shifted(x, start) if d == dim else x for d, x in enumerate(index)]
            return self.load(source, moved, domain, mask)
        return self._cat(node, index, domain, mask)

    def _cat(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text:
        parts = node.args[0]
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(index)
        at, start = index[dim], 0
        found: list[tuple[str, Text]] = []
        for part in parts:
            size = int(value(part).shape[dim])
            inside = f"({at.text} >= {start}) & ({at.text} < {start + size})"
            both = inside if mask is None else f"{mask.text} & {inside}"
            axes = at.axes if mask is None else at.axes | mask.axes
            moved = [_shifted(i, -start) if d == dim else i for d, i in enumerate(index)]
            found.append(
                (
                    f"{at.text} < {start + size}",
                    self.load(part, moved, domain, Text(both, "bool", axes)),
                )
            )
            start += size
        kind = kind_of(value(node).dtype)
        out = found[-1][1].to(kind)
        for before, part in reversed(found[:-1]):
            text = f"tl.where({before}, {part.to(kind).text}, {out.text})"
            out = Text(text, kind, out.axes | part.axes | at.axes)
        return out

    def gathered(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text:
        if node.target is aten.embedding.default:
            table, ids = node.args[:2]
            chosen = self._chosen(ids, index[:-1], domain, mask)
            return self.load(table, [chosen, index[-1]], domain, mask)
        if node.target is aten.index.Tensor:
            x, indices = node.args
            lead = max(value(i).dim() for i in indices)
            shape = self.shape(node)
            place = [
                _as_index(self.spread(i, index[:lead], shape[:lead], domain, mask)) for i in indices
            ]
            return self.load(x, place + index[lead:], domain, mask)
        x, dim, chosen_by = node.args[:3]
        dim %= len(index)
        at = [index[dim]] if node.target is aten.index_select.default else index
        chosen = self._chosen(chosen_by, at, domain, mask)
        return self.load(x, [chosen if d == dim else i for d, i in enumerate(index)], domain, mask)

    def _chosen(self, node: Node, index: list[Text], domain: Domain, mask: Text | None) -> Text:
        return _as_index(self.load(node, index, domain, mask))

    # Statements.

    def _tile(self, node: Node) -> None:
        domain = self.domain(self.inner(node))
        index = self.index(self.shape(node), domain)
        text = domain.whole(
            self.compute(node, index, domain, domain.mask).to(kind_of(value(node).dtype))
        )
        self.hold(node, text, domain)

    def hold(self, node: Node, text: str, domain: Domain) -> None:
        """Keep a tile in registers, and in memory too where it is read there."""
        name = f"v{len(self.held)}"
        self.lines.append(f"{name} = {text}")
        self.held[node] = name
        if node in self.kept:
            index = self.index(self.shape(node), domain)
            self.store(node, self.stored_text(node, name), index, domain.mask)

    def loop(self, count: int, write: Callable[[Text, Domain], None]) -> None:
        """`write(place, domain)` for runs of CHUNK of `count` places."""
        block = min(CHUNK, power_of_two(count))
        self.largest = max(self.largest, block)
        outer, self.lines = self.lines, []
        domain = Domain(("j",), (count,), (block,), looped=True)
        write(domain.axis(0), domain)
        body, self.lines = self.lines, outer
        # A barrier inside is one before the loop: nothing that the loop stores is read in it.
        self.lines += [line for line in body if line == "tl.debug_barrier()"][:1]
        self.lines.append(f"for base in range(0, {count}, {block}):")
        self.lines.append(f"    j = base + tl.arange(0, {block})")
        self.lines += [f"    {line}" for line in body if line != "tl.debug_barrier()"]

    def _loop(self, node: Node) -> None:
        shape = self.shape(node)
        lead = self.lead(shape)
        inner = [1 if d == lead else s for d, s in enumerate(shape)]

        def write(place: Text, domain: Domain) -> None:
            index = reshaped([place], [prod(inner)], inner)
            index = [ROW if d == lead else i for d, i in enumerate(index)]
            made = self.compute(node, index, domain, domain.mask).to(kind_of(value(node).dtype))
            self.store(node, self.stored_text(node, domain.whole(made)), index, domain.mask)

        self.loop(prod(int(s) for s in inner), write)

    def _readers(self, node: Node) -> int:
        return len([u for u in readers(node) if u in self.inside])

    def _reduce(self, node: Node) -> None:
        x = node.args[0]
        shape = self.shape(x)
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        dims = [d % len(shape) for d in dims] or list(range(len(shape)))
        lead = self.lead(shape)
        if lead in dims:
            raise Split(node)
        kept = [d for d, s in enumerate(shape) if d != lead and s != 1 and d not in dims]
        gone = [d for d, s in enumerate(shape) if d != lead and s != 1 and d in dims]
        sizes = tuple(int(shape[d]) for d in kept)
        out = self.domain(sizes)
        if fits(int(shape[d]) for d in (*kept, *gone)):
            text = self._reduced_tile(node, x, shape, gone)
        else:
            text = self._reduced_loop(node, x, shape, kept, gone)
        if node.target is aten.mean.dim:
            text = f"tl.div_rn({text}, {float(prod(int(shape[d]) for d in gone))})"
        if node.target in (aten.any.dim, aten.all.dim):
            text = f"{text} != 0"
        if value(node).dtype in (torch.bfloat16, torch.float16):
            half = self.stored_text(node, f"({text})")
            text = f"{half}.to(tl.float32)"
        self.hold(node, text, out)

    def _operand(self, node: Node, x: Text, domain: Domain) -> tuple[str, str]:
        """The tile to reduce, padding replaced by the identity, and the identity."""
        kind = kind_of(value(node).dtype)
        made = x.to(kind)
        text = domain.whole(made)
        if kind == "bool":
            text = f"({text}).to(tl.int32)"
        identity = _identity(REDUCE[node.target][0], kind)
        if domain.mask is not None:
            text = f"tl.where({domain.mask.text}, {text}, {identity})"
        return text, identity

    def _reduced_tile(self, node: Node, x: Node, shape: list[Size], gone: list[int]) -> str:
        lead = self.lead(shape)
        every = [d for d, s in enumerate(shape) if d != lead and s != 1]
        domain = self.domain(tuple(int(shape[d]) for d in every))
        text, _ = self._operand(
            node, self.load(x, self.index(shape, domain), domain, domain.mask), domain
        )
        if not gone:
            return text
        name = f"x{len(self.held)}"
        self.lines.append(f"{name} = {text}")
        return self._along(node, name, sorted((every.index(d) for d in gone), reverse=True))

    def _along(self, node: Node, name: str, axes: list[int]) -> str:
        text = name
        for axis in axes:
            text = REDUCE[node.target][2].format(text, axis)
        if node.target in EXTREME and kind_of(value(node).dtype) in ("float", "double"):
            wrong = f"({name} != {name}).to(tl.int32)"
            for axis in axes:
                wrong = f"tl.max({wrong}, {axis})"
            text = f'tl.where({wrong} != 0, float("nan"), {text})'
        return text

    def _reduced_loop(
        self, node: Node, x: Node, shape: list[Size], kept: list[int], gone: list[int]
    ) -> str:
        """Runs of the axes that go, the last axis of a domain over those that stay."""
        lead = self.lead(shape)
        count = prod(int(shape[d]) for d in gone)
        sizes = tuple(int(shape[d]) for d in kept)
        block = max(1, min(CHUNK, LIMIT // prod(tile_of(sizes))))
        if block < 16:
            raise Split(node)
        spread = "".join("None, " for _ in sizes)
        names = [f"b{len(self.lines)}_{i}" for i in range(len(sizes))]
        for i, name in enumerate(names):
            at = ", ".join(":" if d == i else "None" for d in range(len(sizes) + 1))
            self.lines.append(f"{name} = tl.arange(0, {tile_of(sizes)[i]})[{at}]")
        domain = Domain((*names, "j"), (*sizes, count), (*tile_of(sizes), block), looped=True)
        self.largest = max(self.largest, prod(domain.padded))
        flat = reshaped([domain.axis(len(sizes))], [count], [shape[d] for d in gone])
        index = [ROW if d == lead else ZERO for d in range(len(shape))]
        for i, d in enumerate(kept):
            index[d] = domain.axis(i)
        for i, d in zip(flat, gone, strict=True):
            index[d] = i
        outer, self.lines = self.lines, []
        text, identity = self._operand(node, self.load(x, index, domain, domain.mask), domain)
        body, self.lines = self.lines, outer
        assert all(line == "tl.debug_barrier()" for line in body)
        self.lines += body[:1]
        kind = kind_of(value(node).dtype)
        word = {"float": "float32", "double": "float64", "int": "int64", "bool": "int32"}[kind]
        total = f"x{len(self.held)}"
        tile = ", ".join(map(str, domain.padded))
        self.lines += [
            f"{total} = tl.full([{tile}], {identity}, tl.{word})",
            f"for base in range(0, {count}, {block}):",
            f"    j = (base + tl.arange(0, {block}))" + (f"[{spread}:]" if spread else ""),
            f"    {total} = {self._step(node, kind).format(total, text)}",
        ]
        return self._along(node, total, [len(sizes)])

    def _step(self, node: Node, kind: str) -> str:
        if node.target in EXTREME:
            nan = ", propagate_nan=tl.PropagateNan.ALL" if kind in ("float", "double") else ""
            return f"tl.{EXTREME[node.target]}({{0}}, {{1}}{nan})"
        return REDUCE[node.target][1]

    def _scatter(self, node: Node) -> None:
        """cache[row_seq, row_pos] = rows, in place."""
        if node.target is operators.WRITE_ROWS:
            state, rows, *indices = node.args
        else:
            state, indices, rows = node.args[:3]
        shape = self.shape(rows)
        lead = max(value(i).dim() for i in indices)
        sizes = self.inner(rows)
        pointer = self.pointer(state)
        for reader in self.nodes[: self.nodes.index(node)]:
            if state in reader.all_input_nodes:
                if reader.target is not aten.index.Tensor or not _same_place(reader, indices):
                    raise Split(node)
                self.lines.append("tl.debug_barrier()")
                break

        def write(index: list[Text], domain: Domain) -> None:
            mask = domain.mask
            first = [self.spread(i, index[:lead], shape[:lead], domain, mask) for i in indices]
            place = [_as_index(i) for i in first] + index[lead:]
            text = self.load(rows, index, domain, mask).to(kind_of(value(rows).dtype))
            at = linear(place, self.shape(state))
            masked = f", mask={mask.text}" if mask is not None else ""
            new = self.stored_text(rows, domain.whole(text))
            self.lines.append(f"tl.store({pointer} + {at.text}, {new}{masked})")

        if fits(sizes):
            domain = self.domain(sizes)
            write(self.index(shape, domain), domain)
        else:
            own = self.lead(shape)
            inner = [1 if d == own else s for d, s in enumerate(shape)]

            def write_run(place: Text, domain: Domain) -> None:
                index = reshaped([place], [prod(inner)], inner)
                write([ROW if d == own else i for d, i in enumerate(index)], domain)

            self.loop(prod(int(s) for s in inner), write_run)
        self.updated.append(state)


def _same_place(gather: Node, indices: list[Node]) -> bool:
    """Whether a gather reads what this program writes: sequences have slots of their own."""
    return base(gather.args[1][0]) is base(indices[0])


def readers(node: Node) -> list[Node]:
    """Who reads a value, seen through views."""
    out: list[Node] = []
    for user in node.users:
        out.extend(readers(user) if user.target in MOVES else [user])
    return out


def _shifted(index: Text, by: int) -> Text:
    if not by:
        return index
    return Text(f"({index.text} {'+' if by > 0 else '-'} {abs(by)})", "index", index.axes)


def _as_index(x: Text) -> Text:
    return Text(x.text, "index", x.axes)


def _identity(word: str, kind: str) -> str:
    if word not in ("LOWEST", "HIGHEST"):
        return f"{word}.0" if kind in ("float", "double") else word
    if kind in ("float", "double"):
        return 'float("-inf")' if word == "LOWEST" else 'float("inf")'
    return str(-(1 << 63) if word == "LOWEST" else (1 << 63) - 1)


def _mentions(text: str, word: str) -> bool:
    code = "\n".join(line for line in text.splitlines() if not line.strip().startswith("#"))
    return re.search(rf"\b{word}\b", code) is not None
