"""A CUDA artifact run on the CPU: its plan, launch by launch, through Triton's interpreter.

It serves the loop as an executor does, so that whole generations can be compared with other
artifacts. Scratch is poisoned before every step, and tickets must be zero after every launch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter  # first of all: it makes this process interpret
import numpy as np
import torch

from dcompile.codegen.cuda.lower import CudaLowered
from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.decode.loop import Runner
from dcompile.runtime.plan import Launch, Plan
from dcompile.runtime.state import Binding, Memory
from dcompile.runtime.tensors import array_of, tensor_of
from dcompile.runtime.turns import Bools, Turns, repeat
from dcompile.runtime.weights import DTYPES, Array

assert interpreter


class InterpretedExecutor(Backend):
    """Keeps its folder of printed sources while it lives."""

    threads, check_every = 1, 1

    def __init__(self, plan: Plan, kernels: Mapping[str, Any], emitted: str) -> None:
        self.plan, self.kernels = plan, kernels
        self._folder = tempfile.TemporaryDirectory()
        self._modules: dict[str, ModuleType] = {}
        if emitted:
            # A real file: the interpreter reads a kernel's source where it was defined.
            path = Path(self._folder.name, "emitted.py")
            path.write_text(emitted)
            self._modules["emitted"] = _module("emitted", path)
        self.memory: Memory | None = None
        self.launched = 0
        self.wanted = np.zeros(1, np.int32)

    @classmethod
    def of(cls, artifact: Artifact) -> InterpretedExecutor:
        kernels = json.loads(artifact.text("kernels.json"))["kernels"]
        printed = "kernels/source/emitted.py"
        emitted = artifact.text(printed) if printed in artifact.names else ""
        out = cls(artifact.plan, kernels, emitted)
        out.memory = Memory(artifact)
        return out

    @property
    def state(self) -> Mapping[str, Array]:
        return self.memory.state

    def bind(self, R: int, B: int) -> Binding:
        return self.with_tickets(self.memory.bind(R, B))

    def with_tickets(self, binding: Binding) -> Binding:
        R, B = binding.R, binding.B
        for index, buffer in enumerate(self.plan.buffers):
            if buffer.kind == "zeroed" and index not in binding.made:
                shape = buffer.extent(R, B)
                binding.made[index] = np.zeros(shape, DTYPES[buffer.dtype])
        return binding

    def launch(
        self, binding: Binding, seconds: Any = None, part: tuple[int, int] | None = None
    ) -> None:
        first, last = part or (0, len(self.plan.launches))
        if part is None:
            binding.arena.fill(0xFF)
        for launch in self.plan.launches[first:last]:
            self.run(launch, binding)

    def run(self, launch: Launch, binding: Binding, loop: Mapping[str, Any] | None = None) -> None:
        """One launch over a grid of the plan's own; `loop` is the memory that the runtime gives."""
        symbols = {"R": binding.R, "B": binding.B}
        grid = tuple(axis(binding.R, binding.B) for axis in launch.grid)
        if 0 in grid:
            return
        entry = self.kernels[launch.kernel]
        values: dict[str, Any] = {}
        for parameter, argument in zip(entry["arguments"], launch.args, strict=True):
            ((kind, what),) = argument.items()
            if kind == "b":
                tensor = tensor_of(binding.values(what))
                if tensor.data_ptr() % 16 and parameter["aligned"]:
                    raise AssertionError(f"{launch.name}: {parameter['name']} is not aligned")
                values[parameter["name"]] = tensor
            elif kind == "i":
                values[parameter["name"]] = what(symbols["R"], symbols["B"])
            else:
                values[parameter["name"]] = (loop or {})[what] if kind == "loop" else what
        for name, value in entry["constants"]:
            values[name] = self.resolve(value) if isinstance(value, str) else value
        self.resolve(entry["kernel"])[grid](**values)
        self.launched += 1
        for index, buffer in enumerate(self.plan.buffers):
            if buffer.kind == "zeroed":
                assert not binding.values(index).any(), f"{launch.name} leaves tickets behind"

    def resolve(self, name: str) -> Any:
        module, _, function = name.partition(":")
        if module not in self._modules:
            self._modules[module] = importlib.import_module(module)
        return getattr(self._modules[module], function)

    def repeat(self, binding: Binding, turns: int) -> Turns:
        done = binding.values(self.plan.outputs["done"])

        def step() -> Bools:
            self.launch(binding)
            return done.astype(np.bool_)

        return repeat(step, binding.arrays, turns, wanted=self.wanted)

    def push(self, slot: int) -> None: ...

    def pull(self, slot: int) -> None: ...

    def clear(self, name: str, slot: int) -> None:
        self.memory.state[name][slot] = 0

    def put(self, name: str, value: Array) -> None:
        self.memory.state[name][...] = value


def run_lowered(
    lowered: CudaLowered, tensors: Mapping[str, torch.Tensor], R: int, B: int = 1
) -> dict[str, torch.Tensor]:
    """The outputs of a plan over tensors by its inputs' and weights' names; states change in place."""
    plan = Plan.read(json.loads(json.dumps(lowered.plan)), "test")
    kernels = {v.name: v.to_json() for v in lowered.variants}
    executor = InterpretedExecutor(plan, kernels, lowered.emitted)
    names = {tensor: name for tensor, name, _ in lowered.stored}
    fixed = {}
    for index, buffer in enumerate(plan.buffers):
        if buffer.kind in ("weight", "state", "input"):
            given = array_of(tensors[names.get(buffer.tensor, buffer.name)])
            assert given.dtype == DTYPES[buffer.dtype] and given.flags.c_contiguous
            fixed[index] = given.reshape(buffer.extent(R, B))
    offsets, end = [], 0
    for slot in range(plan.slots):
        sizes = [b.bytes(R, B) for b in plan.buffers if b.kind == "slot" and b.slot == slot]
        offsets.append(end)
        end += -(-max(sizes, default=0) // 64) * 64
    arena = np.empty(end + 64, np.uint8)
    arena = arena[-arena.ctypes.data % 64 :]
    binding = Binding(plan, R, B, arena, offsets, fixed, {})
    executor.launch(executor.with_tickets(binding))
    return {name: tensor_of(value) for name, value in binding.outputs.items()}


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_{abs(hash(path))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def open_interpreted(path: Path) -> Runner:
    """A runner over an artifact for CUDA, on this machine's CPU."""
    artifact = open_artifact(path)
    return Runner(artifact, InterpretedExecutor.of(artifact))
