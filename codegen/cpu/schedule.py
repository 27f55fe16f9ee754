"""The order of launches: library kernels, emitted functions for runs of small operators, ATen calls."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from dcompile.codegen.cpu.emit import Group, can_emit, emit_group
from dcompile.codegen.cpu.select import TABLE, WITHOUT_KERNEL, select
from dcompile.codegen.launches import Launch, Schedule, base, strided
from dcompile.codegen.refusals import no_kernel
from dcompile.errors import UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.program import Program
from dcompile.ir.show import target_name

aten = torch.ops.aten
VIEWS = (aten.reshape.default, operator.getitem)


def schedule(program: Program) -> Schedule:
    """Turn every node into a launch, a part of one, or a view; raises UnsupportedModel."""
    return _Scheduler(program).run()


class _Scheduler:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.out = Schedule()
        self.group = Group()
        self.library: dict[Node, Launch] = {}

    def run(self) -> Schedule:
        for node in self.program.nodes():
            if node.op == "call_function" and (launch := select(self.program, node)) is not None:
                self.library[node] = launch
        self.absorbed = self._absorbed_slices()
        for node in self.program.nodes():
            if node.op != "call_function" or node.target in VIEWS or node in self.absorbed:
                continue
            if isinstance(node.meta["val"], (int, torch.SymInt)):
                continue  # a size is part of the arguments that use it
            if node in self.library:
                self._close_before(self.library[node].reads())
                self._library(node)
            elif can_emit(node):
                self.group.nodes.append(node)
            else:
                self._close_before(list(node.all_input_nodes))
                self.out.launches.append(self._aten(node))
        self._close()
        self._check_states()
        return self.out

    def _absorbed_slices(self) -> set[Node]:
        """Slices that only silu_mul reads, which takes a row stride."""
        out = set()
        for node in self.program.calls(aten.slice.Tensor):
            readers = list(node.users)
            if strided(node)[0] is not node and all(
                u.target is operators.SILU_MUL and u in self.library for u in readers
            ):
                out.add(node)
        return out

    def _library(self, node: Node) -> None:
        launch = self.library[node]
        self.out.launches.append(launch)
        if node.target is operators.NORM_ROPE_WRITE:
            for user in node.users:
                if user.args[1] in (1, 2):
                    self.out.aliases[user] = launch.updates[user.args[1] - 1]  # type: ignore

    def _aten(self, node: Node) -> Launch:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            remedy = WITHOUT_KERNEL.get(target)
            raise no_kernel(self.program, node, "CPU", target in TABLE, remedy)
        several = isinstance(node.meta["val"], (tuple, list))
        writes = sorted(node.users, key=lambda u: u.args[1]) if several else [node]  # type: ignore
        return Launch("aten", f"aten.{target_name(node)}", node, [], writes, covers=[node])

    def _close_before(self, reads: list[Node]) -> None:
        inside = set(self.group.nodes)
        if any(base(r) in inside for r in reads):
            self._close()

    def _close(self) -> None:
        group, self.group = self.group, Group()
        inside = set(group.nodes)
        needed = {n for n in group.nodes if _read_outside(n, inside)}
        # What nobody reads but through a view of a state is still written.
        if not group.nodes:
            return
        name = self._name(group)
        source, launch = emit_group(self.program, group, name, needed)
        launch.covers = group.nodes
        known = self._known(source, launch.touches)
        if known is None:
            self.out.sources[name], self.out.touches[name] = source, launch.touches
        else:
            launch.kernel = known
        for node in group.nodes:
            if node.target in (aten.index_put.default, operators.WRITE_ROWS):
                state = node.args[0]
                assert isinstance(state, Node)
                self.out.aliases[node] = state
        self.out.launches.append(launch)

    def _known(self, source: str, touches: str) -> str | None:
        """The function that does the same over buffers of the same extents."""
        for name, other in self.out.sources.items():
            if _body(other) == _body(source) and self.out.touches[name] == touches:
                return name
        return None

    def _name(self, group: Group) -> str:
        if any(n.target is aten.index_put.default for n in group.nodes):
            stem = "commit"
        else:
            words = [target_name(n).partition(".")[0].strip("_") for n in group.nodes]
            distinct = list(dict.fromkeys(w.rpartition("dcompile")[2] or w for w in words))
            stem = "_".join(["pointwise", *distinct[:4]])
        stem = "".join(c if c.isalnum() else "_" for c in stem)
        count = sum(k == stem or k.startswith(stem + "_") for k in self.out.sources)
        return stem if count == 0 else f"{stem}_{count}"

    def _check_states(self) -> None:
        (values,) = self.program.result().args
        for node, output in zip(values, self.program.outputs, strict=True):  # type: ignore
            state = None if output.state is None else self.program.placeholder(output.state)
            if (
                state is not None
                and self.out.aliases.get(base(node)) is not state
                and node is not state
            ):
                raise UnsupportedModel(f"state {output.state} is not updated in place")


def _read_outside(node: Node, inside: set[Node]) -> bool:
    for user in node.users:
        if user.target is aten.reshape.default:
            if _read_outside(user, inside):
                return True
        elif user not in inside:
            return True
    return False


def _body(source: str) -> str:
    """Source without the function's name and comments: equal bodies are one function."""
    lines = [line for line in source.splitlines()[1:] if not line.strip().startswith("//")]
    return "\n".join(lines)
