"""Launches a plan: a native region is one call into the artifact's code, the rest is torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dcompile.errors import ArtifactError, ContractError
from dcompile.runtime.artifact import Artifact
from dcompile.runtime.backend import Backend
from dcompile.runtime.cpu.abi import Kernel, read_kernels
from dcompile.runtime.cpu.checks import check_launches
from dcompile.runtime.plan import Launch, Size
from dcompile.runtime.state import Binding, Memory
from dcompile.runtime.turns import Bools, Turns, repeat
from dcompile.runtime.weights import DTYPES

Int64s = npt.NDArray[np.int64]
# Below this, waiting for a second thread costs more than it computes (seen: 0.9 ms alone, 19 with two
# threads on busy cores, for a model of 7 MB).
_SMALL_MODEL = 64 << 20
_POISON = 0xFF
# The process's own table, as dlopen's is: a library once loaded stays, and keeps its descriptor.
_libraries: dict[str, ctypes.CDLL] = {}


@dataclass(frozen=True)
class NativeCall:
    """One region: an array of `Launch` of the kernel ABI, and the arguments that it points to."""

    launches: Int64s
    arguments: Int64s


@dataclass(frozen=True)
class TorchCall:
    operator: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    writes: tuple[torch.Tensor | None, ...]
    name: str

    def __call__(self) -> None:
        where = f"launch {self.name} ({self.operator})"
        try:
            results = self.operator(*self.args, **self.kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            first = str(error).partition("\n")[0]
            what = f"the plan is damaged: torch refuses an operator's arguments: {first}"
            raise ArtifactError(what, where=where, remedy="compile the model again") from error
        if not isinstance(results, (tuple, list)):
            results = (results,)
        for result, target in zip(results, self.writes, strict=False):
            if target is None:
                continue
            if not isinstance(result, torch.Tensor) or result.shape != target.shape:
                tensor = isinstance(result, torch.Tensor)
                have = list(result.shape) if tensor else type(result).__name__
                what = f"it gave {have} for a buffer of {list(target.shape)}"
                raise ContractError(what, where=where)
            # An operator that wrote in place returns what is already there.
            if result.data_ptr() != target.data_ptr():
                target.copy_(result)


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
    def state(self) -> Mapping[str, torch.Tensor]:
        return self.memory.state

    def bind(self, R: int, B: int) -> Binding:
        binding = self.memory.bind(R, B)
        if binding.calls is None:
            templates = iter(self._templates)
            binding.calls = [
                next(templates).bind(binding)
                if kind == "native"
                else self._torch_calls(binding, start, end)
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
            binding.arena.fill_(_POISON)
        self._set_threads(self.threads)
        for (_, begin, stop), call in zip(self.plan.regions, binding.calls, strict=True):
            start, end = max(begin, first), min(stop, last)
            if start >= end:
                continue
            if not isinstance(call, NativeCall):
                calls = call[start - begin : end - begin]
                self._run_torch(calls, None if seconds is None else seconds[start:end])
            elif seconds is None:
                self._run(call.launches[start - begin :].ctypes.data, end - start)
            else:
                address = seconds[start:end].ctypes.data
                self._run_timed(call.launches[start - begin :].ctypes.data, end - start, address)

    def repeat(self, binding: Binding, turns: int) -> Turns:
        done = binding.tensor(self.plan.outputs["done"])

        def step() -> Bools:
            self.launch(binding)
            return done.numpy().astype(np.bool_)

        return repeat(step, binding.arrays, turns, self.check_every, self.wanted)

    def push(self, slot: int) -> None:
        """Here the host wrote the only one."""

    def pull(self, slot: int) -> None:
        """Here the host reads what the step wrote."""

    def clear(self, name: str, slot: int) -> None:
        self.memory.state[name][slot].zero_()

    def put(self, name: str, value: torch.Tensor) -> None:
        self.memory.state[name].copy_(value)

    def _run_torch(self, calls: list[TorchCall], seconds: npt.NDArray[np.float64] | None) -> None:
        with torch.inference_mode(), _torch_threads(self.threads):
            for index, call in enumerate(calls):
                began = perf_counter() if seconds is not None else 0.0
                call()
                if seconds is not None:
                    seconds[index] = perf_counter() - began

    def _torch_calls(self, binding: Binding, start: int, end: int) -> list[TorchCall]:
        def value(arg: Any) -> Any:
            if isinstance(arg, list):
                return [value(item) for item in arg]
            if not isinstance(arg, dict):
                return arg
            ((kind, inner),) = arg.items()
            if kind == "b":
                return None if inner is None else binding.tensor(inner)
            if kind == "i":
                return inner(binding.R, binding.B)
            return DTYPES[inner] if kind == "dtype" else inner

        return [
            TorchCall(
                operator,
                [value(arg) for arg in launch.args],
                {key: value(arg) for key, arg in launch.kwargs.items()},
                tuple(None if i is None else binding.tensor(i) for i in launch.writes),
                launch.name,
            )
            for launch, operator in zip(
                self.plan.launches[start:end], self._operators[start:end], strict=True
            )
        ]

    def _resolve(self, launch: Launch) -> Any:
        """A kernel's address, or a torch operator."""
        if launch.native:
            for library in self._libraries:
                if hasattr(library, launch.kernel):
                    return ctypes.cast(getattr(library, launch.kernel), ctypes.c_void_p).value
            what = f"the plan launches kernel {launch.kernel!r}, which the artifact lacks"
            raise ArtifactError(what, where=launch.name, remedy="compile the model again")
        try:
            namespace, name, overload = launch.kernel.split(".")
            if namespace != "aten":
                raise AttributeError(namespace)
            operator = getattr(getattr(torch.ops.aten, name), overload)
        except (AttributeError, ValueError) as error:
            what = f"torch {torch.__version__} has no operator {launch.kernel!r}"
            remedy = "compile the model again with this torch"
            raise ArtifactError(what, where=launch.name, remedy=remedy) from error
        if not isinstance(operator, torch._ops.OpOverload) or not _is_plain(operator, launch):
            what = f"{launch.kernel} is no operator that computes a value from others"
            raise ArtifactError(what, where=launch.name, remedy="compile the model again")
        return operator

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
        return NativeCall(launches, arguments)


# By name, for what they do besides: read a file, move a tensor's memory, trust their caller.
_UNSAFE = {"from_file", "set_data", "record_stream", "empty_strided", "data"}
_MOVING = ("set_", "resize_", "resize_as_", "as_strided_", "swap", "rename_")


def _is_plain(operator: torch._ops.OpOverload, launch: Launch) -> bool:
    """Whether an operator is meant for any arguments, and changes only what the launch writes."""
    schema = operator._schema
    name = schema.name.removeprefix("aten::")
    spelled = name.startswith("__") and name.endswith("__")  # an operator of Python: `>>`, `&`
    hidden = name.startswith("_") and not spelled
    private = hidden and torch.Tag.core not in operator.tags and name not in _PRIVATE
    if private or name in _UNSAFE or name.startswith(_MOVING):
        return False
    given = dict(zip((a.name for a in schema.arguments), launch.args, strict=False))
    given |= launch.kwargs
    return all(
        isinstance(given.get(a.name), dict) and given[a.name].get("b") in launch.writes
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    )


# Private in torch, and all the same what export writes down for a public function.
_PRIVATE = {
    "_to_copy",
    "_softmax",
    "_log_softmax",
    "_unsafe_view",
    "_unsafe_index",
    "_assert_async",
}


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


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ignore(threads: int) -> None:
    """Where no native code runs, nobody needs to know."""
