"""Memory on the GPU: weights, state, scratch, and what a plan's buffers are for given R and B.

Inputs lie one after another, in pinned host memory and on the GPU alike, with the memory of the loop
behind them, so that one copy brings all of them over. Addresses never change while a binding lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from dcompile.runtime import weights
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.cuda.device import Bytes, Device
from dcompile.runtime.plan import Plan
from dcompile.runtime.state import Binding, BoundMemory
from dcompile.runtime.turns import Flag
from dcompile.runtime.weights import ALIGN, DTYPES, Array

LOOP = ("limit", "turn", "go", "finished", "performed")
"""The loop's own memory, in the order in which it lies behind the inputs.

`wanted` is no part of it: one word of the host's, which the GPU reads over the bus at every turn.
"""
_VISIBLE = ("canvas", "policy")
"""Kinds of state that the host looks at; the others are many bytes that only kernels touch."""


@dataclass
class DeviceBinding(Binding):
    """The plan's buffers on the GPU for R rows and B sequences; `arrays` are the host's side of inputs."""

    device: Device | None = None
    places: dict[int, int] = field(default_factory=dict)
    """Addresses of weights, states, inputs and zeroed scratch."""
    base: int = 0
    """Where the scratch begins."""
    loop: dict[str, int] = field(default_factory=dict)
    staging: tuple[int, int, int] = (0, 0, 0)
    """Where inputs and loop lie on the host and on the GPU, and their bytes."""
    counters: dict[str, Any] = field(default_factory=dict)
    """The loop's memory on the host, as it is brought over."""
    results: tuple[int, int, int] = (0, 0, 0)
    """Where finished and performed go on the host, lie on the GPU, and their bytes."""
    returned: dict[str, Any] = field(default_factory=dict)
    graphs: dict[Any, Any] = field(default_factory=dict)
    used: int = 0
    """How often it was run."""

    def values(self, index: int) -> Array:
        """A copy of a buffer's values, now."""
        return self._copy(index)[1]

    def put(self, index: int, value: Array) -> None:
        assert self.device is not None
        whole, part = self._copy(index)
        part[...] = value
        self.device.upload(self.address(index), whole.ctypes.data, whole.nbytes)
        self.device.wait()

    def _copy(self, index: int) -> tuple[Array, Array]:
        """What lies from a buffer's first to its last element, and the buffer in it."""
        buffer = self.plan.buffers[index]
        shape, dtype = buffer.extent(self.R, self.B), DTYPES[buffer.dtype]
        strides = [stride(self.R, self.B) for stride in buffer.strides]
        span = prod(shape)
        if buffer.kind == "view":
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if span else 0
        whole = np.empty(span * dtype.itemsize, np.uint8)
        assert self.device is not None
        self.device.download(whole.ctypes.data, self.address(index), whole.nbytes)
        self.device.wait()
        if buffer.kind != "view":
            return whole, whole.view(dtype).reshape(shape)
        steps = [stride * dtype.itemsize for stride in strides]
        return whole, np.ndarray(shape, dtype, whole.data, 0, steps)

    def _place(self, index: int) -> int | None:
        return self.places.get(index)

    def _scratch(self) -> int:
        return self.base


class Mirrors(Mapping[str, Array]):
    """State by name: what the host reads and writes has a copy there, pushed and pulled slot by slot.

    Of the others (keys and values, mixtures of smoothing) one gets a copy as they are now.
    """

    def __init__(self, plan: Plan, device: Device, addresses: Mapping[str, int]) -> None:
        self._plan, self._device, self._addresses = plan, device, addresses
        self._pinned: list[int] = []
        self._held: dict[str, Array] = {}
        for name in plan.holding(*_VISIBLE):
            buffer = plan.buffers[plan.state[name]]
            size = buffer.bytes(1, 1)
            address, view = device.pinned(size)
            self._pinned.append(address)
            dtype = DTYPES[buffer.dtype]
            self._held[name] = view[:size].view(dtype).reshape(buffer.extent(1, 1))

    def __getitem__(self, name: str) -> Array:
        if name in self._held:
            return self._held[name]
        buffer = self._plan.buffers[self._plan.state[name]]
        out = np.empty(buffer.extent(1, 1), DTYPES[buffer.dtype])
        self._device.download(out.ctypes.data, self._addresses[name], buffer.bytes(1, 1))
        self._device.wait()
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.state)

    def __len__(self) -> int:
        return len(self._plan.state)

    def push(self, slot: int | None = None) -> None:
        """Bring the host's side of a slot (of all) over."""
        self._each(slot, lambda host, device, size: self._device.upload(device, host, size))

    def pull(self, slot: int | None = None) -> None:
        """Fetch a slot (all); there once the stream is waited for."""
        self._each(slot, self._device.download)

    def clear(self, name: str, slot: int) -> None:
        """Zero what a state holds for a slot, on both sides."""
        buffer = self._plan.buffers[self._plan.state[name]]
        size = buffer.bytes(1, 1) // buffer.extent(1, 1)[0]
        self._device.fill(self._addresses[name] + slot * size, 0, size)
        if name in self._held:
            self._held[name][slot] = 0

    def put(self, name: str, value: Array) -> None:
        """Give a whole state another value, on both sides."""
        buffer = self._plan.buffers[self._plan.state[name]]
        whole = np.empty(buffer.extent(1, 1), DTYPES[buffer.dtype])
        whole[...] = value
        self._device.upload(self._addresses[name], whole.ctypes.data, whole.nbytes)
        self._device.wait()
        if name in self._held:
            self._held[name][...] = whole

    def close(self) -> None:
        self._held.clear()
        for address in self._pinned:
            self._device.free_pinned(address)

    def _each(self, slot: int | None, copy: Callable[[int, int, int], None]) -> None:
        for name, held in self._held.items():
            part, at = (held, 0) if slot is None else (held[slot : slot + 1], slot)
            copy(part.ctypes.data, self._addresses[name] + at * part.nbytes, part.nbytes)


class DeviceMemory(BoundMemory[DeviceBinding]):
    """Everything that a loaded artifact keeps on the GPU; scratch grows and is reused.

    `held` are addresses of weights that are on the GPU already.
    """

    def __init__(
        self, artifact: Artifact, device: Device, held: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(artifact.plan)
        self.device = device
        self._held = held or {}
        self._owned: list[int] = []
        self._places: dict[int, int] = {}
        for index, buffer in enumerate(self.plan.buffers):
            if buffer.kind == "weight":
                self._places[index] = self._weight(artifact, index)
        addresses = {}
        for name, index in self.plan.state.items():
            size = self.plan.buffers[index].bytes(1, 1)
            self._places[index] = addresses[name] = self._allocate(size, f"state {name}")
            device.fill(addresses[name], 0, size)
        device.wait()
        self.state = Mirrors(self.plan, device, addresses)
        self._wanted, word = device.pinned(4)
        self.wanted: Flag = word.view(np.int32)
        self._arena = self._arena_bytes = 0
        self._zeroed = {
            index: (0, 0) for index, b in enumerate(self.plan.buffers) if b.kind == "zeroed"
        }
        self.on_drop: Callable[[DeviceBinding], None] = lambda binding: None
        """Told of a binding that goes, so that its graphs do too."""

    def close(self) -> None:
        """Give everything back; nothing may be used after."""
        self._drop_all()
        self.state.close()
        self.device.free_pinned(self._wanted)
        self.wanted = np.zeros(1, np.int32)
        zeroed = [address for address, size in self._zeroed.values() if size]
        for address in (*self._owned, *zeroed, *([self._arena] if self._arena_bytes else [])):
            self.device.free(address)
        self._owned, self._arena_bytes, self._zeroed = [], 0, {}

    def _allocate(self, size: int, what: str) -> int:
        address = self.device.allocate(size, what)
        self._owned.append(address)
        return address

    def _weight(self, artifact: Artifact, index: int) -> int:
        buffer = self.plan.buffers[index]
        if buffer.tensor in self._held:
            return self._held[buffer.tensor]
        entry = artifact.tensors[buffer.tensor]
        size = buffer.bytes(1, 1)
        # The plan's shape is how kernels read the bytes; the file has at least as many.
        as_read = weights.Entry(entry.file, DTYPES["u8"], (size,), entry.start, size)
        data = weights.mapped(artifact.bytes(entry.file), as_read)
        address = self._allocate(size, f"weight {buffer.tensor}")
        self.device.upload(address, data.ctypes.data, size)
        return address

    def _grow(self, end: int, R: int, B: int) -> None:
        if end > self._arena_bytes:
            self._drop_all()
            if self._arena_bytes:
                self.device.free(self._arena)
                self._arena_bytes = 0
            self._arena = self.device.allocate(end, f"the scratch of {R} rows")
            self._arena_bytes = end
        for index, (address, held) in self._zeroed.items():
            size = self.plan.buffers[index].bytes(R, B)
            if size <= held:
                continue
            self._drop_all()
            if held:
                self.device.free(address)
            address = self.device.allocate(size, "counters")
            self.device.fill(address, 0, size)
            self._zeroed[index] = (address, size)

    def _bound(self, R: int, B: int, offsets: list[int]) -> DeviceBinding:
        # A pipeline has several blocks of a slot at once, each with a clock.
        slots, at = self.plan.sizes["N"] * self.plan.sizes.get("blocks", 1), 0
        pieces: dict[str, tuple[int, int]] = {}
        loop = {name: 4 for name in LOOP} | {"finished": 4 * slots, "performed": 8 * slots}
        inputs = {name: self.plan.buffers[i].bytes(R, B) for name, i in self.plan.inputs.items()}
        for name, size in (*inputs.items(), *loop.items()):
            key = name if name in inputs else f"loop {name}"
            pieces[key] = (at, size)
            at += size + -size % ALIGN
        host, view = self.device.pinned(at)
        place = self.device.allocate(at, "inputs")
        begin = pieces["loop finished"][0]
        answer, answered = self.device.pinned(at - begin)
        arrays: dict[str, Array] = {}
        places = {**self._places, **{i: address for i, (address, _) in self._zeroed.items()}}
        for name, index in self.plan.inputs.items():
            buffer = self.plan.buffers[index]
            flat = _part(view, pieces[name]).view(DTYPES[buffer.dtype])
            arrays[name] = flat.reshape(buffer.extent(R, B))
            places[index] = place + pieces[name][0]
        binding = DeviceBinding(
            plan=self.plan,
            R=R,
            B=B,
            arena=np.empty(0, np.uint8),
            offsets=offsets,
            fixed={},
            arrays=arrays,
            device=self.device,
            places=places,
            base=self._arena,
            loop={
                "wanted": self._wanted,
                **{name: place + pieces[f"loop {name}"][0] for name in LOOP},
            },
            staging=(host, place, at),
            results=(answer, place + begin, at - begin),
        )
        for name in LOOP:
            kind = np.int64 if name == "performed" else np.int32
            start, size = pieces[f"loop {name}"]
            binding.counters[name] = _part(view, (start, size)).view(kind)
            if start >= begin:
                binding.returned[name] = _part(answered, (start - begin, size)).view(kind)
        return binding

    def _drop(self, binding: DeviceBinding) -> None:
        # What is in the stream may still read it.
        self.device.wait()
        self.on_drop(binding)
        for name in (*binding.arrays,):
            binding.arrays[name] = binding.arrays[name].copy()
        self.device.free_pinned(binding.staging[0])
        self.device.free_pinned(binding.results[0])
        self.device.free(binding.staging[1])


def _part(view: Bytes, piece: tuple[int, int]) -> Bytes:
    return view[piece[0] : piece[0] + piece[1]]
