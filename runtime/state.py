"""Memory of a loaded artifact, and what a plan's buffers are for given numbers of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np

from dcompile.errors import ArtifactError
from dcompile.runtime import pages, weights
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.plan import Buffer, Plan, base_of
from dcompile.runtime.weights import ALIGN, DTYPES, Array

KEPT_BINDINGS = 64


@dataclass
class Binding:
    """The plan's buffers for R rows and B sequences."""

    plan: Plan
    R: int
    B: int
    arena: Array
    offsets: list[int]
    fixed: Mapping[int, Array]
    arrays: dict[str, Array]
    """The inputs, as the host fills them."""
    made: dict[int, Array] = field(default_factory=dict)
    calls: Any = None
    """What the launcher prepared for these buffers."""

    def values(self, index: int) -> Array:
        """The values of a buffer; on the processor the buffer itself."""
        if index not in self.made:
            self.made[index] = self._make(index)
        return self.made[index]

    def _make(self, index: int) -> Array:
        if index in self.fixed:
            return self.fixed[index]
        buffer = self.plan.buffers[index]
        shape, dtype = buffer.extent(self.R, self.B), DTYPES[buffer.dtype]
        if buffer.kind == "view":
            base = base_of(self.plan.buffers, index)
            strides = [stride(self.R, self.B) * dtype.itemsize for stride in buffer.strides]
            start = self.address(index) - self.address(base)
            memory = self.values(base).reshape(-1).view(np.uint8)
            return np.ndarray(shape, dtype, memory.data, start, strides)
        start = self.offsets[buffer.slot]
        region = self.arena[start : start + buffer.bytes(self.R, self.B)]
        return region.view(dtype).reshape(shape)

    def address(self, index: int) -> int:
        """Where a buffer begins, also one that only native code sees."""
        buffer = self.plan.buffers[index]
        if (found := self._place(index)) is not None:
            return found
        if buffer.kind == "view":
            skipped = buffer.offset(self.R, self.B) * DTYPES[buffer.dtype].itemsize
            return self.address(buffer.base) + skipped
        return self._scratch() + self.offsets[buffer.slot]

    def put(self, index: int, value: Array) -> None:
        """Give a buffer other values, of its own shape."""
        self.values(index)[...] = value

    def _place(self, index: int) -> int | None:
        """Where a buffer lies that has a place of its own."""
        return self.fixed[index].ctypes.data if index in self.fixed else None

    def _scratch(self) -> int:
        return self.arena.ctypes.data

    @property
    def outputs(self) -> dict[str, Array]:
        return {name: self.values(index) for name, index in self.plan.outputs.items()}


Bound = TypeVar("Bound", bound=Binding)


class BoundMemory(ABC, Generic[Bound]):
    """Bindings by (R, B), kept while their addresses hold; slots one after another in the scratch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._slotted = [buffer for buffer in plan.buffers if buffer.kind == "slot"]
        self._bindings: OrderedDict[tuple[int, int], Bound] = OrderedDict()

    def bind(self, R: int, B: int) -> Bound:
        """The buffers for R rows of B sequences; the same object while its addresses hold."""
        found = self._bindings.get((R, B))
        if found is not None:
            self._bindings.move_to_end((R, B))
            return found
        while len(self._bindings) >= KEPT_BINDINGS:
            self._drop(self._bindings.popitem(last=False)[1])
        sizes = [0] * self.plan.slots
        for buffer in self._slotted:
            sizes[buffer.slot] = max(sizes[buffer.slot], buffer.bytes(R, B))
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += size + -size % ALIGN
        self._grow(end, R, B)
        binding = self._bindings[R, B] = self._bound(R, B, offsets)
        return binding

    def _drop_all(self) -> None:
        while self._bindings:
            self._drop(self._bindings.popitem()[1])

    @abstractmethod
    def _grow(self, end: int, R: int, B: int) -> None:
        """Make the scratch at least `end` bytes; where it moves, bindings over it go."""

    @abstractmethod
    def _bound(self, R: int, B: int, offsets: list[int]) -> Bound:
        """A new binding whose slots begin at `offsets` of the scratch."""

    def _drop(self, binding: Bound) -> None:
        """A binding goes."""


class Memory(BoundMemory[Binding]):
    """Mapped weights, state allocated once, and an arena for scratch that grows and is reused."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.plan)
        self._fixed = {
            index: _weight(artifact, buffer)
            for index, buffer in enumerate(self.plan.buffers)
            if buffer.kind == "weight"
        }
        self.state: dict[str, Array] = {}
        for name, index in self.plan.state.items():
            buffer = self.plan.buffers[index]
            self.state[name] = _allocate(buffer.extent(1, 1), DTYPES[buffer.dtype], name)
            self._fixed[index] = self.state[name]
        self._arena: Array = np.empty(0, np.uint8)

    def _grow(self, end: int, R: int, B: int) -> None:
        if end > self._arena.size:
            self._drop_all()
            self._arena = _allocate((end,), DTYPES["u8"], f"the scratch of {R} rows")

    def _bound(self, R: int, B: int, offsets: list[int]) -> Binding:
        fixed, arrays = dict(self._fixed), {}
        for name, index in self.plan.inputs.items():
            buffer = self.plan.buffers[index]
            shape, dtype = buffer.extent(R, B), DTYPES[buffer.dtype]
            fixed[index] = arrays[name] = _allocate(shape, dtype, f"the input {name}")
        return Binding(self.plan, R, B, self._arena, offsets, fixed, arrays)


def _weight(artifact: Artifact, buffer: Buffer) -> Array:
    # The plan's shape and dtype are how kernels read the bytes; the file's may be of another kind.
    entry = artifact.tensors[buffer.tensor]
    shape, dtype = buffer.extent(1, 1), DTYPES[buffer.dtype]
    as_read = weights.Entry(entry.file, dtype, shape, entry.start, prod(shape) * dtype.itemsize)
    return weights.mapped(artifact.bytes(entry.file), as_read)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> Array:
    """Zeros that take memory only once they are written to: a plan may ask for more than it uses."""
    size = prod(shape) * dtype.itemsize
    try:
        held = pages.zeros(size + ALIGN)
    except (MemoryError, ValueError) as error:
        remedy = "compile with a smaller --max-length or --batch"
        raise ArtifactError(
            f"no memory for {what}: {size / 2**30:.1f} GiB", remedy=remedy
        ) from error
    start = -held.ctypes.data % ALIGN
    return held[start : start + size].view(dtype).reshape(shape)
