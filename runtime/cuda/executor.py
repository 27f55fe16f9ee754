"""Launches a plan on a GPU: the same interface as `runtime/cpu/executor.py`, so that the loop is the same.

A block's iterations are one launch: a graph that copies the inputs over, loops until a sequence is done,
and copies two short counters back. Drivers older than CUDA 12.4 have no loops in graphs: there some
iterations are one launch, and those after a sequence is done change nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.errors import ArtifactError, DeviceError
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.cuda.checks import check_launches
from dcompile.runtime.cuda.code import Code
from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.driver import Driver
from dcompile.runtime.cuda.graphs import Call, Copy, Graph, Instance, packed
from dcompile.runtime.cuda.memory import DeviceBinding, DeviceMemory
from dcompile.runtime.cuda.table import SCALARS, Argument
from dcompile.runtime.plan import Launch
from dcompile.runtime.state import Binding
from dcompile.runtime.turns import Turns
from dcompile.runtime.weights import Array

Floats = npt.NDArray[np.float64]
_HASTY = 1 << 30
"""With more bytes of weights than this, an iteration takes longer than a look at its result."""


class CudaExecutor(Backend):
    """An artifact on a GPU; what `step` returns are copies.

    `check_every` is how many iterations are one launch where the driver has no loops in graphs (None:
    by the model's size), `loops=False` uses none; `held` are addresses of weights that are there
    already. Raises WrongArchitecture, DeviceError, ArtifactError.
    """

    threads = 1

    def __init__(
        self,
        artifact: Artifact,
        device: Device | None = None,
        check_every: int | None = None,
        loops: bool = True,
        held: Mapping[str, int] | None = None,
    ) -> None:
        self.plan = artifact.plan
        self.device = device or Device(Driver())
        self.arch = self.device.arch
        self.device.enter()
        self._code = Code(self.device)
        self.kernels = self._code.load(artifact)
        check_launches(self.plan, {name: each.entry for name, each in self.kernels.items()})
        self.memory = DeviceMemory(artifact, self.device, held)
        self.memory.on_drop = _drop_graphs
        self.wanted = self.memory.wanted
        self.loops = loops and self.plan.loop is not None and self.device.driver.has_while
        if check_every is None:
            size = sum(
                buffer.bytes(1, 1) for buffer in self.plan.buffers if buffer.kind == "weight"
            )
            check_every = 1 if size > _HASTY else 4
        self.check_every = check_every
        self._condition = self._code.condition() if self.loops else None
        self.loops = self._condition is not None
        self._cu_launch = self.device.driver.function("cuLaunchKernel")
        self._events: list[int] = []
        self.graph_launches = 0
        """How many graphs were launched, for who counts."""

    @property
    def state(self) -> Mapping[str, Array]:
        return self.memory.state

    def fill(self, inputs: Mapping[str, Array]) -> Binding:
        """As on the processor; the host's state is brought over."""
        binding = super().fill(inputs)
        self.memory.state.push()
        return binding

    def bind(self, R: int, B: int) -> DeviceBinding:
        self.device.enter()
        binding = self.memory.bind(R, B)
        if binding.calls is None:
            binding.calls = [self._call(binding, launch) for launch in self.plan.launches]
        return binding

    def launch(
        self,
        binding: Binding,
        seconds: Floats | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Run launches `part` (default all) one by one, and wait; `seconds` takes each one's time.

        Inputs come over before the first launch; the host's state follows after the last.
        """
        assert isinstance(binding, DeviceBinding)
        self.device.enter()
        first, last = part or (0, len(self.plan.launches))
        if first == 0:
            host, place, size = binding.staging
            self.device.upload(place, host, size)
        events = self._timers(last - first + 1) if seconds is not None else []
        if events:
            self.device.record(events[0])
        for at in range(first, last):
            self._run(binding.calls[at])
            if events:
                self.device.record(events[at - first + 1])
        if last == len(self.plan.launches):
            self.memory.state.pull()
        self.device.wait()
        if seconds is not None:
            for at in range(first, last):
                begin, end = events[at - first], events[at - first + 1]
                seconds[at] = self.device.seconds(begin, end)

    def repeat(self, binding: Binding, turns: int) -> Turns:
        assert isinstance(binding, DeviceBinding)
        self.device.enter()
        for counter in binding.counters.values():
            counter.fill(0)
        binding.counters["limit"].fill(turns)
        if self.loops and (turns > 1 or binding.used):
            self._replay(binding, "loop", partial(self._looped, binding))
            self.device.wait()
        else:
            self._repeat_in_parts(binding, turns)
        binding.used += 1
        count = binding.B
        performed = binding.returned["performed"][:count].tolist()
        return Turns(performed, [bool(each) for each in binding.returned["finished"][:count]])

    def replay(self, binding: DeviceBinding, turns: int) -> None:
        """Launch `turns` iterations over buffers that are filled and uploaded as one graph; do not wait."""
        calls = turns * [*self._iteration(binding)]
        self._replay(binding, f"{turns} turns", partial(_put, calls))

    def loop_over(self, binding: DeviceBinding, calls: Sequence[Call | None]) -> Instance:
        """A graph whose loop runs `calls` and the end of a turn, to see what a turn costs."""
        graph = Graph(self.device)
        self._looped(binding, graph, calls)
        return graph.instantiate()

    def push(self, slot: int) -> None:
        """Bring a slot's state over from the host."""
        self.memory.state.push(slot)

    def pull(self, slot: int) -> None:
        """Fetch a slot's state for the host."""
        self.memory.state.pull(slot)
        self.device.wait()

    def clear(self, name: str, slot: int) -> None:
        self.memory.state.clear(name, slot)

    def put(self, name: str, value: Array) -> None:
        self.memory.state.put(name, value)
        self.device.wait()

    def bandwidth(self) -> float:
        """Bytes a second that the GPU writes to its memory, the best of some fills of 256 MiB."""
        self.device.enter()
        size = 256 << 20
        place = self.device.allocate(size, "a measurement of the memory")
        begin, end = self._timers(2)
        times = []
        for turn in range(8):
            self.device.record(begin)
            self.device.fill(place, turn, size)
            self.device.record(end)
            self.device.wait()
            times.append(self.device.seconds(begin, end))
        self.device.free(place)
        return size / max(min(times), 1e-9)

    def close(self) -> None:
        """Give the GPU's memory and code back."""
        self.device.enter()
        self.memory.close()
        self.wanted = self.memory.wanted
        for event in self._events:
            self.device.driver.call("cuEventDestroy_v2", event)
        self._events = []
        self._code.close()

    def _call(self, binding: DeviceBinding, launch: Launch) -> Call | None:
        """A launch over bound buffers; None where it has no programs."""
        x, y, z = (expression(binding.R, binding.B) for expression in launch.grid)
        if 0 in (x, y, z):
            return None
        kernel = self.kernels[launch.kernel]
        arguments = zip(kernel.entry.arguments, launch.args, strict=True)
        values = [_value(binding, argument, given) for argument, given in arguments]
        pointers, data = packed([*values, bytes(8), bytes(8)], kernel.layout)
        entry = kernel.entry
        return Call(
            kernel.function,
            (x, y, z),
            entry.threads,
            entry.dynamic_shared,
            pointers,
            data,
            launch.name,
        )

    def _run(self, call: Call | None) -> None:
        if call is None:
            return
        status = call.launch(self._cu_launch, self.device.stream)
        if status:
            error = self.device.driver.error("cuLaunchKernel", status)
            raise DeviceError(error.what, where=f"launch {call.name}")

    def _repeat_in_parts(self, binding: DeviceBinding, turns: int) -> None:
        """The loop of `turns.repeat` on the host, some iterations a launch."""
        host, place, size = binding.staging
        self.device.upload(place, host, size)
        left = turns
        while left:
            # What runs once is not worth a graph.
            if turns == 1 and not binding.used:
                count = 1
                for call in self._iteration(binding):
                    self._run(call)
            else:
                count = self.check_every if left >= self.check_every else 1
                self.replay(binding, count)
            self.device.download(*binding.results)
            self.device.wait()
            left -= count
            if self.wanted[0] or binding.returned["finished"][: binding.B].any():
                break

    def _iteration(self, binding: DeviceBinding) -> Sequence[Call | None]:
        if self.plan.loop is None:
            raise ArtifactError("the plan does not say how a turn ends", remedy="compile it again")
        if "turn" not in binding.graphs:
            binding.graphs["turn"] = self._call(binding, self.plan.loop)
        return [*binding.calls, binding.graphs["turn"]]

    def _replay(self, binding: DeviceBinding, key: str, build: Callable[[Graph], None]) -> None:
        """Launch a binding's graph, built the first time."""
        if key not in binding.graphs:
            graph = Graph(self.device)
            build(graph)
            binding.graphs[key] = graph.instantiate()
        self.graph_launches += 1
        binding.graphs[key].launch()

    def _looped(
        self, binding: DeviceBinding, graph: Graph, calls: Sequence[Call | None] | None = None
    ) -> None:
        """Inputs over, iterations (or `calls`) while none is done, counters back."""
        host, place, size = binding.staging
        graph.copy(Copy(place, host, size, to_device=True))
        body, handle = graph.loop()
        turn = self._iteration(binding)
        _put(turn if calls is None else [*calls, turn[-1]], body)
        assert self._condition is not None
        values = [struct.pack("<Q", handle), struct.pack("<Q", binding.loop["go"])]
        pointers, data = packed(values, ((0, 0, 8), (1, 8, 8)))
        body.kernel(Call(self._condition, (1, 1, 1), 1, 0, pointers, data, "set_condition"))
        answer, back, length = binding.results
        graph.copy(Copy(answer, back, length, to_device=False))

    def _timers(self, count: int) -> list[int]:
        while len(self._events) < count:
            self._events.append(self.device.event())
        return self._events[:count]


def _value(binding: DeviceBinding, argument: Argument, given: Mapping[str, Any]) -> bytes:
    ((kind, value),) = given.items()
    if kind == "b":
        return struct.pack("<Q", binding.address(value))
    if kind == "loop":
        return struct.pack("<Q", binding.loop[value])
    if kind == "i":
        value = value(binding.R, binding.B)
    return struct.pack("<" + SCALARS[argument.type], value)


def _put(calls: Sequence[Call | None], graph: Graph) -> None:
    for call in calls:
        if call is not None:
            graph.kernel(call)


def _drop_graphs(binding: DeviceBinding) -> None:
    for graph in binding.graphs.values():
        if isinstance(graph, Instance):
            graph.close()
    binding.graphs.clear()
