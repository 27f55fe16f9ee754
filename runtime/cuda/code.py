"""Loads an artifact's kernels onto a GPU, each checked against its own binary first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dcompile.errors import ArtifactError, DeviceError, WrongArchitecture
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.graphs import SET_CONDITION
from dcompile.runtime.cuda.table import Entry, check_entry, choose, entry_of, layout, table_of

Compile = Callable[[Artifact, int], tuple[Mapping[str, Any], Mapping[str, bytes]]]
"""Compiles an artifact's kernels for an architecture: the `kernels` of a table, and its files."""


@dataclass
class Hooks:
    """What the runtime cannot do by itself; `dcompile.driver.missing_kernels` sets it where Triton is there."""

    compile: Compile | None = None


hooks = Hooks()


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel and where its arguments lie."""

    entry: Entry
    function: int
    layout: tuple[tuple[int, int, int], ...]


class Code:
    """The modules that one executor loaded."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._modules: list[int] = []

    def load(self, artifact: Artifact) -> dict[str, Kernel]:
        """The kernels that the plan names; raises WrongArchitecture, ArtifactError, DeviceError."""
        plan, arch = artifact.plan, self.device.arch
        table, files = _binaries(artifact, self.device)
        names = {launch.kernel for launch in plan.launches}
        if plan.loop is not None:
            names.add(plan.loop.kernel)
        out = {}
        for name in sorted(names):
            if name not in table:
                what = f"the plan launches kernel {name!r}, which the artifact lacks"
                raise ArtifactError(what, remedy="compile the model again")
            entry = entry_of(table, name, arch)
            cubin = files.get(entry.file) or bytes(artifact.bytes(entry.file))
            check_entry(entry, cubin, arch, self.device.shared_limit)
            module = self._module(cubin, f"kernel {name} ({entry.file})")
            function = self.device.function(module, entry.entry, entry.dynamic_shared)
            out[name] = Kernel(entry, function, layout(entry.arguments))
        return out

    def condition(self) -> int | None:
        """The kernel that sets a loop's condition; None where the driver cannot assemble it."""
        try:
            module = self._module(SET_CONDITION.encode(), "set_condition")
        except DeviceError:
            return None
        return self.device.function(module, "set_condition")

    def close(self) -> None:
        for module in self._modules:
            self.device.driver.call("cuModuleUnload", module)
        self._modules = []

    def _module(self, image: bytes, where: str) -> int:
        module = self.device.module(image, where)
        self._modules.append(module)
        return module


def _binaries(artifact: Artifact, device: Device) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
    """The kernels' table, and binaries that the artifact itself lacks."""
    table = table_of(artifact)
    try:
        choose(table, device.arch, device.name, str(artifact.path))
    except WrongArchitecture:
        if hooks.compile is None:
            raise
        return hooks.compile(artifact, device.arch)
    return table, {}
