"""Where values live: weights, states, inputs, and slots that values share when their lives are apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from dcompile.codegen.launches import Schedule, Scratch, Value, base
from dcompile.codegen.pack import packed_size
from dcompile.codegen.triton.variant import ITEM_BYTES
from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.show import SHORT
from dcompile.ir.sizes import Size, elements, evaluate, shape_of

# Sizes are compared at a typical iteration: one sequence, a block's rows.
TYPICAL = {"R": 64, "B": 1}


@dataclass
class Buffers:
    """The plan's buffer table, and the index of each value in it."""

    table: list[dict[str, Any]] = field(default_factory=list)
    index: dict[object, int] = field(default_factory=dict)
    arguments: dict[Value | Scratch, int | None] = field(default_factory=dict)  # of kernels
    slots: int = 0


def plan_buffers(program: Program, schedule: Schedule) -> Buffers:
    """Give every value that a launch reads or writes a place; slots are reused after the last reader."""
    return _Planner(program, schedule).run()


class _Planner:
    def __init__(self, program: Program, schedule: Schedule) -> None:
        self.program = program
        self.schedule = schedule
        self.out = Buffers()
        self.slot_bytes: list[int] = []

    def run(self) -> Buffers:
        for item in self.program.inputs:
            if item.kind in ("state", "step"):
                self.place(self.program.placeholder(item.name))
        last = self._last_use()
        free: list[int] = []
        ending: dict[int, list[Node | Scratch]] = {}
        for node, at in last.items():
            ending.setdefault(at, []).append(node)
        for at, launch in enumerate(self.schedule.launches):
            for node in launch.writes:
                self._give_slot(node, free)
            for argument in launch.args:
                if isinstance(argument, Value):
                    self.out.arguments[argument] = self.argument(argument)
                elif isinstance(argument, Scratch):
                    self.out.arguments[argument] = self._scratch(argument, free)
            if launch.kind == "aten":
                for node in launch.reads():
                    self.place(node)
            # A value nobody reads has its place during its own launch.
            for node in ending.get(at, []):
                slot = self.out.table[self.out.index[node]]["place"].get("slot")
                if slot is not None:
                    free.append(slot)
        for node in self._returned():
            self.place(node)
        self.out.slots = len(self.slot_bytes)
        return self.out

    def root(self, node: Node) -> Node:
        """The value in memory behind views, and the state behind a value updated in place."""
        node = base(node)
        return self.schedule.aliases.get(node, node)

    def _returned(self) -> list[Node]:
        return list(self.program.result().args[0])  # type: ignore[arg-type]

    def _last_use(self) -> dict[Node | Scratch, int]:
        last: dict[Node | Scratch, int] = {}
        for at, launch in enumerate(self.schedule.launches):
            for node in launch.writes:
                last[node] = at
            for argument in launch.args:
                if isinstance(argument, Scratch) and not argument.zeroed:
                    last[argument] = at
            for node in launch.reads():
                root = self.root(node)
                if root in last:
                    last[root] = at
        for node in self._returned():
            last.pop(self.root(node), None)
        return last

    def _scratch(self, wanted: Scratch, free: list[int]) -> int:
        """The buffer of scratch memory; of zeroed memory there is one, as large as the largest."""
        key: object = "zeroed" if wanted.zeroed else wanted
        if key in self.out.index:
            index = self.out.index[key]
            if wanted.zeroed:
                (size,) = self.out.table[index]["shape"]
                self.out.table[index]["shape"] = [at_most(size, wanted.size)]
            return index
        place: dict[str, Any] = {"kind": "zeroed"}
        if not wanted.zeroed:
            count = evaluate(elements([wanted.size, ITEM_BYTES[wanted.dtype]]), TYPICAL)
            place = {"kind": "slot", "slot": self._slot(count, free)}
        name = "tickets" if wanted.zeroed else wanted.name
        self.out.index[key] = len(self.out.table)
        entry = {"name": name, "dtype": wanted.dtype, "shape": [wanted.size], "place": place}
        self.out.table.append(entry)
        return self.out.index[key]

    def _give_slot(self, node: Node, free: list[int]) -> None:
        size = evaluate(elements([*self.shape(node), value(node).element_size()]), TYPICAL)
        self._add(node, node, {"kind": "slot", "slot": self._slot(size, free)})

    def _slot(self, size: int, free: list[int]) -> int:
        """A slot of about this many bytes, a free one where there is any."""
        fitting = [s for s in free if self.slot_bytes[s] >= size]
        if fitting:
            slot = min(fitting, key=lambda s: self.slot_bytes[s])
        elif free:
            slot = max(free, key=lambda s: self.slot_bytes[s])
        else:
            slot = len(self.slot_bytes)
            self.slot_bytes.append(0)
        if slot in free:
            free.remove(slot)
        self.slot_bytes[slot] = max(self.slot_bytes[slot], size)
        return slot

    def shape(self, node: Node) -> list[Size]:
        return shape_of(value(node), self.program.symbols)

    def _add(self, key: object, node: Node, place: dict[str, Any], **more: Any) -> int:
        entry = {
            "name": node.name,
            "dtype": SHORT[value(node).dtype],
            "shape": self.shape(node),
            "place": place,
            **more,
        }
        self.out.index[key] = len(self.out.table)
        self.out.table.append(entry)
        return self.out.index[key]

    def place(self, node: Node) -> int:
        """The buffer of a value as it is shaped: its own, or a view of the one behind it."""
        if node in self.out.index:
            return self.out.index[node]
        root = self.root(node)
        if root is not node:
            if root is not base(node):
                self.out.index[node] = self.place(root)
                return self.out.index[node]
            return self._view(node, node, self.place(root), 0, contiguous(self.shape(node)))
        item = self.program.input(node.name) if node.op == "placeholder" else None
        assert item is not None, f"{node.name} is computed by no launch"
        kind = "input" if item.kind == "step" else item.kind
        place: dict[str, Any] = {"kind": kind}
        if kind in ("weight", "constant"):
            place["tensor"] = node.name
        if kind == "state":
            assert item.holds is not None, f"nobody says what the state {node.name} is"
            place["holds"] = item.holds
        return self._add(node, node, place)

    def _view(self, key: object, node: Node, of: int, offset: int, strides: list[Size]) -> int:
        place = {"kind": "view", "of": of, "offset": offset, "strides": strides}
        return self._add(key, node, place)

    def argument(self, argument: Value) -> int | None:
        """The buffer that a native launch gets for an argument."""
        node = argument.node
        if node is None:
            return None
        if argument.layout != "plain":
            return self._packed(node, argument.layout)
        if argument.offset:
            # From the offset to the end of the value; the kernel knows the row stride.
            whole = self.place(self.root(node))
            total = elements(self.shape(node))
            length: Size = (
                total - argument.offset
                if isinstance(total, int)
                else {**total, "": total.get("", 0) - argument.offset}
            )
            key = (node, argument.offset)
            if key not in self.out.index:
                index = self._view(key, node, whole, argument.offset, [1])
                self.out.table[index]["shape"] = [length]
            return self.out.index[key]
        return self.place(self.root(node))

    def _packed(self, node: Node, layout: str) -> int:
        key = (node, layout)
        if key in self.out.index:
            return self.out.index[key]
        *lead, n, k = (int(d) for d in value(node).shape)
        count = packed_size(n, k, value(node).dtype) * (lead[0] if lead else 1)
        name = f"{node.name}.packed"
        index = self._add(key, node, {"kind": "weight", "tensor": name})
        self.out.table[index].update(name=name, shape=[count])
        return index


def at_most(a: Size, b: Size) -> Size:
    """A size that is at least both, for R and B of at least 0."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    x, y = ({"": s} if isinstance(s, int) else s for s in (a, b))
    return {name: max(x.get(name, 0), y.get(name, 0)) for name in sorted({*x, *y})}


def contiguous(shape: list[Size]) -> list[Size]:
    """Row-major strides."""
    return [elements(shape[i + 1 :]) for i in range(len(shape))]
