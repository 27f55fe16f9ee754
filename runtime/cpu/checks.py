"""Holds a plan's launches to what its kernels say of themselves, before any of them runs.

A plan that passes cannot make honest code touch memory outside its buffers, however it came to be:
every extent holds at the smallest and the largest (R, B), and sizes only grow, so it holds between.
What is left to trust is the code itself, and numbers that code which describes no bounds computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from dcompile.errors import ArtifactError
from dcompile.runtime.cpu.abi import Kernel, Parameter, Rule
from dcompile.runtime.plan import Launch, Plan, Size, base_of
from dcompile.runtime.weights import DTYPES

_REMEDY = "compile the model again"
_BYTE_DTYPES = {"bool", "u8"}


def check_launches(plan: Plan, kernels: Mapping[str, Kernel], vocab: int, strict: bool) -> None:
    """Raise ArtifactError at the first launch that its kernel cannot safely take.

    `kernels` are those that the native code describes, `vocab` the number of token ids. Without
    `strict` (code from before kernels described themselves) an unknown kernel passes.
    """
    _Checker(plan, kernels, vocab, strict).run()


@dataclass
class _Checker:
    plan: Plan
    kernels: Mapping[str, Kernel]
    vocab: int
    strict: bool
    owner: dict[int, int] = field(default_factory=dict)
    """The buffer whose values a slot holds."""
    below: dict[int, Size] = field(default_factory=dict)
    """What the integers of a buffer are less than, where that is known."""

    def run(self) -> None:
        self._bound_inputs()
        for launch in self.plan.launches:
            kernel = self.kernels.get(launch.kernel) if launch.native else None
            if kernel is not None:
                _Call(self, launch, kernel).check()
            elif launch.native and self.strict:
                raise broken("its code does not say what the kernel touches", launch)
            self._follow(launch, kernel)
        for name, index in self.plan.outputs.items():
            root = self.root(index)
            if not self.holds(root):
                raise ArtifactError(
                    f"the plan is damaged: output {name!r} is overwritten or never computed",
                    remedy=_REMEDY,
                )

    def root(self, index: int) -> int:
        return base_of(self.plan.buffers, index)

    def holds(self, root: int) -> bool:
        buffer = self.plan.buffers[root]
        return buffer.kind != "slot" or self.owner.get(buffer.slot) == root

    def _bound_inputs(self) -> None:
        n, length = self.plan.sizes["N"], self.plan.sizes["L"]
        known = {
            "row_seq": Size(0, 0, n),
            "row_pos": Size(0, 0, length),
            "row_limit": Size(0, 0, length + 1),
            "block_seq": Size(0, 0, n),
            "block_pos": Size(0, 0, length),
            "choice_row": Size(1, 0, 0),
        }
        for name, index in self.plan.inputs.items():
            if name in known:
                self.below[index] = known[name]
        for name in self.plan.holding("canvas"):
            self.below[self.plan.state[name]] = Size(0, 0, self.vocab)

    def _follow(self, launch: Launch, kernel: Kernel | None) -> None:
        """Which buffers hold their values after the launch; none may read another's."""
        reads, writes = _touched(launch, kernel)
        reads, writes = set(map(self.root, reads)), set(map(self.root, writes))
        for root in reads:
            if not self.holds(root):
                what = (
                    f"it reads {self.plan.buffers[root].name}, which is overwritten or not computed"
                )
                raise broken(what, launch)
        slots: dict[int, int] = {}
        for root in writes:
            buffer = self.plan.buffers[root]
            if buffer.kind == "weight":
                raise broken(f"it writes to the weight {buffer.name}", launch)
            if buffer.kind == "slot" and slots.setdefault(buffer.slot, root) != root:
                raise broken(f"it writes two values to slot {buffer.slot}", launch)
        for root in reads - writes:
            buffer = self.plan.buffers[root]
            if buffer.kind == "slot" and buffer.slot in slots:
                raise broken(f"it writes over {buffer.name}, which it reads", launch)
        self.owner.update(slots)
        if kernel is None:
            for root in writes:
                # The canvas keeps its bound: whoever writes tokens, it holds tokens.
                if self.plan.buffers[root].kind == "slot":
                    self.below.pop(root, None)


def _touched(launch: Launch, kernel: Kernel | None) -> tuple[set[int], set[int]]:
    """Buffers that a launch reads and writes: as its code says, else as the plan says."""
    declared = {index for index in launch.writes if index is not None}
    if kernel is None:
        named = set(_buffers([*launch.args, *launch.kwargs.values()]))
        return (named - declared if launch.native else named), declared
    reads, writes = set(), set()
    for parameter, argument in zip(kernel.parameters, launch.args, strict=True):
        index = argument.get("b")
        if index is not None and parameter.written:
            writes.add(index)
        if index is not None and parameter.read:
            reads.add(index)
    return reads, writes


def _buffers(argument: Any) -> Iterator[int]:
    if isinstance(argument, list):
        for item in argument:
            yield from _buffers(item)
    elif isinstance(argument, dict) and argument.get("b") is not None:
        yield argument["b"]


class _Call:
    """One launch of a kernel that is described."""

    def __init__(self, checker: _Checker, launch: Launch, kernel: Kernel) -> None:
        self.checker, self.plan = checker, checker.plan
        self.launch, self.kernel = launch, kernel
        self.arguments: dict[str, Any] = {}

    def check(self) -> None:
        if len(self.launch.args) != len(self.kernel.parameters):
            count = len(self.kernel.parameters)
            raise self.broken(f"it has {len(self.launch.args)} arguments, its kernel takes {count}")
        for parameter, argument in zip(self.kernel.parameters, self.launch.args, strict=True):
            ((kind, value),) = argument.items()
            if kind != parameter.kind:
                raise self.broken(f"argument {parameter.name} is of another kind ({kind!r})")
            self.arguments[parameter.name] = value
        for R, B in self.plan.corners():
            self._check_at(self._sizes(R, B), R, B)
        for parameter in self.kernel.parameters:
            if parameter.kind == "b" and self.arguments[parameter.name] is not None:
                self._check_values(parameter)
        self._note_values()

    def broken(self, what: str) -> ArtifactError:
        return broken(what, self.launch)

    def _sizes(self, R: int, B: int) -> dict[str, int]:
        sizes = {f"@{key}": value for key, value in self.plan.sizes.items()}
        for parameter in self.kernel.parameters:
            if parameter.kind != "i":
                continue
            size = self.arguments[parameter.name]
            if min(size.rows, size.sequences, size(R, B)) < 0:
                raise self.broken(f"size {parameter.name} is or becomes negative")
            sizes[parameter.name] = size(R, B)
        return sizes

    def _check_at(self, sizes: dict[str, int], R: int, B: int) -> None:
        for rule in self.kernel.rules:
            if not rule.holds(sizes) or (rule.relation == "%" and not self._multiple(rule)):
                raise self.broken(f"its sizes break {rule} at R={R} B={B}")
        for parameter in self.kernel.parameters:
            if parameter.kind != "b":
                continue
            index = self.arguments[parameter.name]
            if index is None:
                if not parameter.optional:
                    raise self.broken(f"argument {parameter.name} is null")
                continue
            if not _same_dtype(parameter.dtype, self.plan.buffers[index].dtype):
                have = self.plan.buffers[index].dtype
                raise self.broken(f"argument {parameter.name} is {have}, not {parameter.dtype}")
            needed = parameter.elements(sizes)
            have = self._available(index, parameter.dtype, R, B)
            if needed > have:
                what = f"argument {parameter.name} has {have} elements, its kernel touches {needed}"
                raise self.broken(f"{what} at R={R} B={B}")

    def _multiple(self, rule: Rule) -> bool:
        """Whether a size is the same multiple of another for every R and B."""
        a, b = self.arguments[rule.left], self.arguments[rule.right]
        times = a(1, 1) // b(1, 1)
        return bool(a == Size(b.rows * times, b.sequences * times, b.fixed * times))

    def _available(self, index: int, dtype: str, R: int, B: int) -> int:
        """Elements from a buffer's first one to the end of the memory that it lies in."""
        buffers, offset = self.plan.buffers, 0
        while buffers[index].kind == "view":
            offset += buffers[index].offset(R, B)
            index = buffers[index].base
        size = DTYPES[buffers[index].dtype].itemsize if dtype == "?" else 1
        return (prod(buffers[index].extent(R, B)) - offset) * size

    def _check_values(self, parameter: Parameter) -> None:
        if not parameter.below:
            return
        known = self.checker.below.get(self.checker.root(self.arguments[parameter.name]))
        if known is None:
            return
        for R, B in self.plan.corners():
            allowed = self._limit(parameter.below, R, B) + parameter.at_most
            if known(R, B) > allowed:
                what = f"argument {parameter.name} holds numbers below {known(R, B)}"
                raise self.broken(f"{what}, its kernel takes those below {allowed}, at R={R} B={B}")

    def _limit(self, text: str, R: int, B: int) -> int:
        """`x/D`: the rows of argument x. `@L`, `E`, `7`, `8*B`: a size."""
        sizes = self._sizes(R, B)
        array, _, row = text.partition("/")
        if row:
            wanted = next(p for p in self.kernel.parameters if p.name == array)
            length = prod(sizes.get(f) or int(f) for f in row.split("*"))
            return self._available(self.arguments[array], wanted.dtype, R, B) // length
        return Parameter("", "b", extent=text).elements(sizes)

    def _note_values(self) -> None:
        for parameter in self.kernel.parameters:
            index = self.arguments.get(parameter.name)
            if parameter.kind != "b" or not parameter.written or index is None:
                continue
            root = self.checker.root(index)
            if self.plan.buffers[root].kind != "slot":
                continue
            self.checker.below.pop(root, None)
            source = self.arguments.get(parameter.values)
            if isinstance(source, Size):
                self.checker.below[root] = source
            elif source is not None:
                known = self.checker.below.get(self.checker.root(source))
                if known is not None:
                    self.checker.below[root] = known


def _same_dtype(wanted: str, have: str) -> bool:
    return wanted == "?" or wanted == have or {wanted, have} <= _BYTE_DTYPES


def broken(what: str, launch: Launch) -> ArtifactError:
    where = f"launch {launch.name} ({launch.kernel})"
    return ArtifactError(f"the plan is damaged: {what}", where=where, remedy=_REMEDY)
