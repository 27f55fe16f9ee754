"""The launches of a CUDA plan: kernel families, printed kernels for the rest, nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from dcompile.codegen.buffers import at_most
from dcompile.codegen.cuda.decompose import decompose
from dcompile.codegen.cuda.emit import SCATTERS, Emitted, Split, can_emit, emit, lead_of
from dcompile.codegen.cuda.pointwise import op_name
from dcompile.codegen.cuda.ranking import SORTS
from dcompile.codegen.cuda.select import EMITTED, TABLE, WITHOUT_KERNEL, Families, Site, code_of
from dcompile.codegen.cuda.tiles import TYPES
from dcompile.codegen.launches import Argument, Float, Int, Launch, Schedule, Scratch, Value
from dcompile.codegen.refusals import no_kernel
from dcompile.codegen.triton.variant import (
    Expression,
    Number,
    Operand,
    Parameter,
    Step,
    Variant,
    evaluate,
    unaligned,
)
from dcompile.errors import UnsupportedModel
from dcompile.ir import operators
from dcompile.ir.edit import value
from dcompile.ir.program import Program
from dcompile.ir.show import show_node, target_name
from dcompile.ir.sizes import Size, elements

aten = torch.ops.aten
RESHAPE = aten.reshape.default


@dataclass
class Printed:
    """The kernels and functions that were printed for a plan, each by its name with its source."""

    kernels: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)


Fit = Callable[[Iterable[Site], Mapping[str, str]], None]
"""Gives sites other tiles; the functions that their kernels inline are those that were printed, by name."""


def schedule(program: Program, arch: int, fit: Fit | None = None) -> tuple[Schedule, Printed]:
    """Turn every node into a launch or a part of one; raises UnsupportedModel with the node's name."""
    decompose(program)
    return _Scheduler(program, arch).run(fit)


class _Scheduler:
    def __init__(self, program: Program, arch: int) -> None:
        self.program = program
        self.families = Families(program, arch)
        self.out = Schedule()
        self.printed = Printed(functions=self.families.functions)
        self.open: dict[str, list[Node]] = {}  # groups of nodes to print, by what leads them
        self.written: dict[Node, Launch] = {}  # states, by the launch that changed them

    def run(self, fit: Fit | None) -> tuple[Schedule, Printed]:
        sites = self.families.sites()
        if fit is not None:
            fit(sites.values(), self.printed.functions)
        for node in self.program.nodes():
            if node.op != "call_function" or isinstance(node.meta["val"], (int, torch.SymInt)):
                continue
            if node in sites:
                self._family(sites[node])
            elif node in self.families.taken or self._is_view(node):
                continue
            elif can_emit(node):
                self._add(node)
            else:
                raise self._refusal(node)
        self._close(list(self.open))
        self._check_states()
        return self.out, self.printed

    def _refusal(self, node: Node) -> UnsupportedModel:
        remedy = WITHOUT_KERNEL.get(node.target)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            remedy = "--target cpu, which falls back to torch for it"
        return no_kernel(self.program, node, "CUDA", node.target in TABLE, remedy)

    def _is_view(self, node: Node) -> bool:
        if node.target is operator.getitem:
            return node.args[0].target not in SORTS
        return node.target is RESHAPE

    # Families.

    def _family(self, site: Site) -> None:
        self._close_before([v.node for v in site.operands.values() if v.node is not None])
        for state in site.updates:
            self._close_readers(state)
        anchor = site.covers[-1]
        label = f"{anchor.name}."
        for step in site.lowering.steps:
            launch = self._launch(step, site, label)
            self._append(launch)
        last = self.out.launches[-1]
        for state in site.updates:
            self.written[state] = last
        if anchor.target is operators.NORM_ROPE_WRITE:
            for user in anchor.users:
                if user.args[1] in (1, 2):
                    self.out.aliases[user] = site.updates[user.args[1] - 1]

    def _launch(self, step: Step, site: Site, label: str) -> Launch:
        scratch = {s.name: s for s in site.lowering.scratch}
        args: list[Argument] = []
        variant, unsteady = step.variant, set()
        for parameter, binding in zip(variant.arguments, step.bindings, strict=True):
            if isinstance(binding, Operand):
                found = site.operands[binding.name]
                args.append(found)
                if found.offset * value(found.node).element_size() % 16:
                    unsteady.add(parameter.name)
            elif isinstance(binding, Number):
                number = binding.value
                args.append(Float(number) if isinstance(number, float) else Int(bound(number)))
            else:
                kept = scratch[binding.name]
                size = bound(kept.elements)
                args.append(Scratch(label + kept.name, kept.dtype, size, kept.zeroed))
        if unsteady:
            variant = unaligned(variant, frozenset(unsteady))
        given = {a.node for a in args if isinstance(a, Value)}
        return Launch(
            "cuda",
            variant.name,
            site.covers[-1],
            args,
            writes=[r for r in site.results if r in given],
            updates=[u for u in site.updates if u in given],
            covers=site.covers,
            variant=variant,
            grid=variant.grid,
        )

    def _append(self, launch: Launch) -> None:
        for state, before in self.written.items():
            if state in launch.reads() and state not in launch.updates and before is not launch:
                raise UnsupportedModel(
                    f"{state.name} is read after it was changed in place",
                    where=show_node(launch.node, self.program),
                    remedy="--target cpu",
                )
        self.out.launches.append(launch)

    # Printed kernels.

    def _add(self, node: Node) -> None:
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        if node.target is operator.getitem:  # belongs to what sorted
            for group in self.open.values():
                if node.args[0] in group:
                    group.append(node)
                    return
        key = str(lead_of(node, self.program))
        self._close_before(inputs, but=key)
        if node.target in SCATTERS:
            self._close_readers(node.args[0], but=key)
        self.open.setdefault(key, []).append(node)

    def _close_before(self, reads: Iterable[Node], but: str | None = None) -> None:
        """Launch the groups that compute what is about to be read."""
        wanted = set()
        for node in reads:
            while node is not None:
                wanted.add(node)
                moves = node.target is RESHAPE or node.target is operator.getitem
                node = node.args[0] if moves and node.op == "call_function" else None
        hit = [k for k, group in self.open.items() if k != but and wanted & set(group)]
        self._close(hit)

    def _close_readers(self, state: Node, but: str | None = None) -> None:
        """Launch the groups that read a state, before it changes."""
        hit = [
            k
            for k, group in self.open.items()
            if k != but and any(state in n.all_input_nodes for n in group)
        ]
        self._close(hit)

    def _close(self, keys: list[str]) -> None:
        for key in keys:
            self._print(self.open.pop(key))

    def _print(self, nodes: list[Node]) -> None:
        if not (nodes := [n for n in nodes if n.users]):
            return
        inside = set(nodes)
        needed = {n for n in nodes if _read_outside(n, inside)}
        try:
            made = emit(self.program, nodes, needed)
        except Split as split:
            at = nodes.index(split.node)
            if at == 0:
                raise UnsupportedModel(
                    f"no CUDA kernel can be printed for {target_name(split.node)}",
                    where=show_node(split.node, self.program),
                    remedy="--target cpu, which falls back to torch for it",
                ) from None
            self._print(nodes[:at])
            self._print(nodes[at:])
            return
        if made.stored or made.updated:
            self._printed(nodes, made)

    def _printed(self, nodes: list[Node], made: Emitted) -> None:
        names = list(made.buffers.values())
        head = f"({', '.join([*names, *made.symbols])}):\n"
        types = {n: TYPES[value(node).dtype] for node, n in made.buffers.items()}
        # A kernel is its code and the types that it is compiled for.
        code = head + code_of(made.body) + str(sorted(types.items()))
        name = next((k for k, text in self.printed.kernels.items() if _key(text) == code), None)
        if name is None:
            name = self._name(nodes)
            comment = f"    # types: {sorted(types.items())}\n"
            self.printed.kernels[name] = head + comment + made.body
            self.printed.imports |= made.imports
        rows: Expression = made.programs
        variant = Variant(
            name=name,
            kernel=f"{EMITTED}:{name}",
            arguments=(
                *(Parameter(n, f"*{types[n]}", aligned=True) for n in names),
                *(Parameter(s, "i32") for s in made.symbols),
            ),
            constants=(),
            grid=(rows, 1, 1),
            num_warps=made.warps,
            num_stages=1,
        )
        args: list[Argument] = [Value(n) for n in made.buffers]
        args += [Int({s: 1}) for s in made.symbols]
        launch = Launch(
            "cuda", name, nodes[-1], args, made.stored, made.updated, nodes,
            variant=variant, grid=variant.grid,
        )  # fmt: skip
        self._append(launch)
        for node in nodes:
            if node.target in SCATTERS:
                self.out.aliases[node] = node.args[0]
                self.written[node.args[0]] = launch

    def _name(self, nodes: list[Node]) -> str:
        if any(n.target is aten.index_put.default for n in nodes):
            stem = "commit"
        else:
            words = [op_name(n).strip("_") or target_name(n).rpartition(".")[2] for n in nodes]
            stem = "_".join(["pointwise", *list(dict.fromkeys(words))[:4]])
        count = sum(k == stem or k.startswith(f"{stem}_") for k in self.printed.kernels)
        return f"{stem}_{count}" if count else stem

    def _check_states(self) -> None:
        (values,) = self.program.result().args
        for node, output in zip(values, self.program.outputs, strict=True):
            if output.state is None:
                continue
            state = self.program.placeholder(output.state)
            if node is not state and self.out.aliases.get(_base(node)) is not state:
                raise UnsupportedModel(f"state {output.state} is not updated in place")


def _base(node: Node) -> Node:
    while node.target is RESHAPE:
        node = node.args[0]
    return node


def _read_outside(node: Node, inside: set[Node]) -> bool:
    for user in node.users:
        if user.target is RESHAPE and user not in inside:
            if _read_outside(user, inside):
                return True
        elif user not in inside and not _only_absorbed(user, inside):
            return True
    return False


def _only_absorbed(user: Node, inside: set[Node]) -> bool:
    return user.target is operator.getitem and user in inside


def _key(text: str) -> str:
    head, _, rest = text.partition("\n")
    comment, _, body = rest.partition("\n")
    return f"{head}\n{code_of(body)}{comment.partition('types: ')[2]}"


def bound(size: Expression) -> Size:
    """An affine size that is at least an expression's value, for R and B of at least 1."""
    if isinstance(size, int):
        return size
    ((name, of), *rest) = size.items()
    if rest or name in ("R", "B", ""):
        return dict(size)  # type: ignore[arg-type]
    sizes = [bound(s) for s in of]
    if name == "mul":
        return elements(sizes)
    if name == "min":
        return next((s for s in sizes if isinstance(s, int)), sizes[0])
    if name == "cdiv":
        of_one = isinstance(sizes[0], int) and isinstance(sizes[1], int)
        return evaluate(size, {}) if of_one else sizes[0]
    if name == "max":
        out = sizes[0]
        for s in sizes[1:]:
            out = at_most(out, s)
        return out
    total: dict[str, int] = {}
    for s in sizes:
        for key, count in ({"": s} if isinstance(s, int) else s).items():
            total[key] = total.get(key, 0) + count
    return total
