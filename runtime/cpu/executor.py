"""Launches a plan: a native region is one call into the artifact's code, the rest is `aten.py`'s."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.errors import ArtifactError, naming_missing
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.cpu.abi import Kernel, read_kernels
from dcompile.runtime.cpu.checks import check_launches
from dcompile.runtime.plan import Launch, Size
from dcompile.runtime.state import Binding, Memory
from dcompile.runtime.turns import Bools, Turns, repeat
from dcompile.runtime.weights import Array

Int64s = npt.NDArray[np.int64]
# Below this, waiting for a second thread costs more than it computes (seen: 0.9 ms alone, 19 with two
# threads on busy cores, for a model of 7 MB).
_SMALL_MODEL = 64 << 20
_POISON = 0xFF
_LAUNCH_BYTES = 16  # function and arguments
# The process's own table, as dlopen's is: a library once loaded stays, and keeps its descriptor.
_libraries: dict[str, ctypes.CDLL] = {}


@dataclass(frozen=True)
class NativeCall:
    """One region: an array of `Launch` of the kernel ABI, and the arguments that it points to."""

    launches: Int64s
    arguments: Int64s
    address: int
    """Of the first launch: numpy takes longer to say it than a small launch runs."""

    def at(self, launch: int) -> int:
        """The address of a launch of the region."""
        return self.address + launch * _LAUNCH_BYTES


class Executor(Backend):
    """An artifact on the processor.

    `poison=True` fills the scratch with NaN before each step, so that nothing read was left there.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        poison: bool = False,
        check_every: int = 1,
    ) -> None:
        self.plan = artifact.plan
        self.check_every = check_every
        self.wanted = np.zeros(1, np.int32)
        self.threads = threads or _default_threads(artifact)
        self._poison = poison
        self._libraries = [_load(artifact, name) for name in artifact.kernel_files]
        foreign = [launch for launch in self.plan.launches if not launch.native]
        self._aten: Any = _import_aten(foreign[0]) if foreign else None
        self._operators = [self._resolve(launch) for launch in self.plan.launches]
        check_launches(
            self.plan,
            _kernels(self._libraries, str(artifact.path)),
            artifact.token_ids,
            strict=artifact.describes_kernels,
        )
        self.memory = Memory(artifact)
        if any(kind == "native" for kind, *_ in self.plan.regions):
            self._run = self._function("dc_run", ctypes.c_void_p, ctypes.c_int64)
            self._run_timed = self._function(
                "dc_run_timed", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
            )
            self._set_threads = self._function("dc_set_threads", ctypes.c_int64)
        else:
            self._set_threads = _ignore
        self._templates = [
            _Template(self.plan.launches[start:end], self._operators[start:end])
            for kind, start, end in self.plan.regions
            if kind == "native"
        ]

    @property
    def state(self) -> Mapping[str, Array]:
        return self.memory.state

    def bind(self, R: int, B: int) -> Binding:
        binding = self.memory.bind(R, B)
        if binding.calls is None:
            templates = iter(self._templates)
            binding.calls = [
                next(templates).bind(binding)
                if kind == "native"
                else self._aten.bind(
                    binding, self.plan.launches[start:end], self._operators[start:end]
                )
                for kind, start, end in self.plan.regions
            ]
        return binding

    def launch(
        self,
        binding: Binding,
        seconds: npt.NDArray[np.float64] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        first, last = part or (0, len(self.plan.launches))
        if self._poison and first == 0:
            binding.arena.fill(_POISON)
        self._set_threads(self.threads)
        for (_, begin, stop), call in zip(self.plan.regions, binding.calls, strict=True):
            start, end = max(begin, first), min(stop, last)
            if start >= end:
                continue
            if not isinstance(call, NativeCall):
                calls = call[start - begin : end - begin]
                self._aten.run(calls, self.threads, None if seconds is None else seconds[start:end])
            elif seconds is None:
                self._run(call.at(start - begin), end - start)
            else:
                times = seconds.ctypes.data + start * seconds.itemsize
                self._run_timed(call.at(start - begin), end - start, times)

    def repeat(self, binding: Binding, turns: int) -> Turns:
        done = binding.values(self.plan.outputs["done"])

        def step() -> Bools:
            self.launch(binding)
            return done.astype(np.bool_)

        return repeat(step, binding.arrays, turns, self.check_every, self.wanted)

    def push(self, slot: int) -> None:
        """Here the host wrote the only one."""

    def pull(self, slot: int) -> None:
        """Here the host reads what the step wrote."""

    def clear(self, name: str, slot: int) -> None:
        self.memory.state[name][slot] = 0

    def put(self, name: str, value: Array) -> None:
        self.memory.state[name][...] = value

    def _resolve(self, launch: Launch) -> Any:
        """A kernel's address, or an operator of torch."""
        if not launch.native:
            return self._aten.resolve(launch)
        for library in self._libraries:
            if hasattr(library, launch.kernel):
                return ctypes.cast(getattr(library, launch.kernel), ctypes.c_void_p).value
        what = f"the plan launches kernel {launch.kernel!r}, which the artifact lacks"
        raise ArtifactError(what, where=launch.name, remedy="compile the model again")

    def _function(self, name: str, *types: Any) -> Callable[..., None]:
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.argtypes, function.restype = types, None
                return function  # type: ignore[no-any-return]
        raise ArtifactError(f"the artifact's code lacks {name!r}", remedy="compile the model again")


class _Template:
    """A native region's arguments as `fixed + rows * R + sequences * B + address of buffer`."""

    def __init__(self, launches: Sequence[Launch], functions: Sequence[int]) -> None:
        sizes: list[Size] = []
        self._buffers: list[tuple[int, int]] = []
        self._starts = []
        for launch in launches:
            self._starts.append(len(sizes))
            for arg in launch.args:
                ((kind, value),) = arg.items()
                if kind == "b" and value is not None:
                    self._buffers.append((len(sizes), value))
                if kind == "f":
                    value = Size(0, 0, int(np.float64(value).view(np.int64)))
                sizes.append(value if isinstance(value, Size) else Size(0, 0, 0))
        self._rows, self._sequences, self._fixed = (
            np.array([getattr(size, key) for size in sizes], dtype=np.int64)
            for key in ("rows", "sequences", "fixed")
        )
        self._functions = np.array(functions, dtype=np.uint64).view(np.int64)

    def bind(self, binding: Binding) -> NativeCall:
        arguments = self._fixed + self._rows * binding.R + self._sequences * binding.B
        for index, buffer in self._buffers:
            arguments[index] = binding.address(buffer)
        addresses = np.array(self._starts, dtype=np.int64) * 8 + arguments.ctypes.data
        launches = np.ascontiguousarray(np.stack([self._functions, addresses], axis=1))
        return NativeCall(launches, arguments, launches.ctypes.data)


def _import_aten(launch: Launch) -> Any:
    """The module that runs ATen launches, and torch with it; raises MissingPackage."""
    with naming_missing(f"launch {launch.name} ({launch.kernel})"):
        from dcompile.runtime.cpu import aten
    return aten


def _kernels(libraries: Sequence[ctypes.CDLL], where: str) -> dict[str, Kernel]:
    """What the code says of its kernels; of two with one name, the first, which is the one run."""
    kernels: dict[str, Kernel] = {}
    for library in libraries:
        if not hasattr(library, "dc_abi"):
            continue
        text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "dc_abi")))
        try:
            described = read_kernels(text.decode())
        except ValueError as error:
            what = f"the code's description of its kernels cannot be read: {error}"
            raise ArtifactError(what, where=where, remedy="use a newer dcompile") from error
        kernels = {**described, **kernels}
    return kernels


def _load(artifact: Artifact, name: str) -> ctypes.CDLL:
    code = artifact.bytes(name)
    # Hashed whatever `verify` said: equal code is loaded once, and only by what it really is.
    digest = hashlib.sha256(code).hexdigest()
    if digest not in _libraries:
        descriptor = os.memfd_create(name.replace("/", "."))
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(code)
            _libraries[digest] = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        except OSError as error:
            os.close(descriptor)
            what = f"the artifact's code cannot be loaded: {error}"
            remedy = "compile the model again on this machine"
            raise ArtifactError(what, where=name, remedy=remedy) from error
    return _libraries[digest]


def _default_threads(artifact: Artifact) -> int:
    hint = artifact.manifest["options"].get("threads")
    if isinstance(hint, int) and hint > 0:
        return hint
    if sum(entry.bytes for entry in artifact.tensors.values()) < _SMALL_MODEL:
        return 1
    return len(os.sched_getaffinity(0))


def _ignore(threads: int) -> None:
    """Where no native code runs, nobody needs to know."""
