"""The fake GPU with real kernels: each launch runs through Triton's interpreter over the fake's memory.

What no one registered is launched without effect, so that paths can be walked where numbers do not matter.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter  # first of all: it makes this process interpret
import torch
from fake_cuda import FakeCuda, Kernel, Launched

from dcompile.codegen.triton.aot import Compiled
from dcompile.codegen.triton.variant import TRITON_TYPES
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.cuda.table import table_of
from dcompile.runtime.tensors import TORCH

assert interpreter
_TORCH = {long: TORCH[short] for short, long in TRITON_TYPES.items()}
_SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
PRINTED = "kernels/source/emitted.py"


class Silent(dict[str, Kernel]):
    """Kernels that do nothing."""

    def __missing__(self, name: str) -> Kernel:
        return lambda launch: None


class InterpretedGpu:
    """Gives a fake GPU the kernels of compiled variants and of artifacts."""

    def __init__(self, fake: FakeCuda, folder: Path) -> None:
        self.fake, self.folder = fake, folder
        self.fake.kernels = Silent()
        self.interpreted = 0
        self._printed = 0

    def add(self, compiled: Sequence[Compiled]) -> None:
        """Kernels of the compiler's own modules."""
        for one in compiled:
            text = one.variant.to_json()
            self.fake.by_digest[self.fake.digest(one.cubin)] = self._kernel(text, {})

    def add_artifact(self, artifact: Artifact, only: Sequence[str] = ()) -> None:
        """An artifact's kernels (`only` of these names), those printed for it among them."""
        modules: dict[str, ModuleType] = {}
        if PRINTED in artifact.names:
            self._printed += 1
            # A real file: the interpreter reads a kernel's source where it was defined.
            path = self.folder / f"emitted_{self._printed}.py"
            path.write_text(artifact.text(PRINTED))
            modules["emitted"] = _module(path)
        for name, entry in table_of(artifact).items():
            if only and name not in only:
                continue
            (binary,) = entry["binaries"].values()
            cubin = bytes(artifact.bytes(binary["file"]))
            self.fake.by_digest[self.fake.digest(cubin)] = self._kernel(entry, modules)

    def _kernel(self, entry: Mapping[str, Any], modules: Mapping[str, ModuleType]) -> Kernel:
        def resolve(name: str) -> Any:
            module, _, function = name.partition(":")
            held = modules.get(module) or importlib.import_module(module)
            return getattr(held, function)

        constants = {
            name: resolve(value) if isinstance(value, str) else value
            for name, value in entry["constants"]
        }
        kernel = resolve(entry["kernel"])

        def run(launch: Launched) -> None:
            values = self._values(launch, entry["arguments"])
            kernel[launch.grid](**values, **constants)
            self.interpreted += 1

        return run

    def _values(self, launch: Launched, parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        types = [p["type"] for p in parameters]
        scalars = {at: _SCALARS[t] for at, t in enumerate(types) if t[0] != "*"}
        places = {
            at: launch.value(at, ctypes.c_uint64) for at in range(len(types)) if at not in scalars
        }
        values: dict[str, Any] = {}
        for at, parameter in enumerate(parameters):
            if at in scalars:
                values[parameter["name"]] = launch.value(at, scalars[at])
                continue
            place = places[at]
            assert place % 16 == 0 or not parameter["aligned"], parameter["name"]
            # Up to the next argument: memory of two dtypes must not be two tensors'.
            size = min(
                [self.fake.extent(place), *(p - place for p in places.values() if p > place)]
            )
            dtype = _TORCH[types[at][1:]]
            block = (ctypes.c_ubyte * (size - size % dtype.itemsize)).from_address(place)
            values[parameter["name"]] = torch.frombuffer(block, dtype=dtype)
        return values


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{abs(hash(path))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
