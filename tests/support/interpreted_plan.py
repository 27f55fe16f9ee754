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

from dcompile.runtime.artifact import Artifact, open_artifact
from dcompile.runtime.loop import Runner
from dcompile.runtime.plan import Launch
from dcompile.runtime.state import Binding, Memory
from dcompile.runtime.turns import Bools, Turns, repeat
from dcompile.runtime.weights import DTYPES

assert interpreter


class InterpretedExecutor:
    """The interface of `runtime/launch.py`; keeps its folder of printed sources while it lives."""

    threads, check_every = 1, 1

    def __init__(self, artifact: Artifact) -> None:
        self.plan = artifact.plan
        self.kernels = json.loads(artifact.text("kernels.json"))["kernels"]
        self._folder = tempfile.TemporaryDirectory()
        self._modules: dict[str, ModuleType] = {}
        if "kernels/source/emitted.py" in artifact.names:
            # A real file: the interpreter reads a kernel's source where it was defined.
            path = Path(self._folder.name, "emitted.py")
            path.write_text(artifact.text("kernels/source/emitted.py"))
            self._modules["emitted"] = _module("emitted", path)
        self.memory = Memory(artifact)
        self.launched = 0

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        return self.memory.state

    def bind(self, R: int, B: int) -> Binding:
        binding = self.memory.bind(R, B)
        for index, buffer in enumerate(self.plan.buffers):
            if buffer.kind == "zeroed" and index not in binding.tensors:
                shape = buffer.extent(R, B)
                binding.tensors[index] = torch.zeros(shape, dtype=DTYPES[buffer.dtype])
        return binding

    def fill(self, inputs: Mapping[str, torch.Tensor]) -> Binding:
        binding = self.bind(len(inputs["row_seq"]), len(inputs["block_seq"]))
        for name, target in binding.inputs.items():
            target.copy_(inputs[name])
        return binding

    def step(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        binding = self.fill(inputs)
        self.launch(binding)
        return binding.outputs

    def launch(self, binding: Binding, *_: Any) -> None:
        binding.arena.fill_(0xFF)
        for launch in self.plan.launches:
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
                tensor = binding.tensor(what)
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
                assert not binding.tensor(index).any(), f"{launch.name} leaves tickets behind"

    def resolve(self, name: str) -> Any:
        module, _, function = name.partition(":")
        if module not in self._modules:
            self._modules[module] = importlib.import_module(module)
        return getattr(self._modules[module], function)

    def repeat(self, binding: Binding, turns: int) -> Turns:
        done = binding.tensor(self.plan.outputs["done"])

        def step() -> Bools:
            self.launch(binding)
            return done.numpy().astype(np.bool_)

        return repeat(step, binding.arrays, turns)

    def push(self, slot: int) -> None: ...

    def pull(self, slot: int) -> None: ...

    def clear(self, name: str, slot: int) -> None:
        self.memory.state[name][slot].zero_()


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
    return Runner(artifact, InterpretedExecutor(artifact))
