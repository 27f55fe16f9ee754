"""Calls kernels of a built shared object from torch tensors, numbers and None."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class Arg(ctypes.Union):
    _fields_ = (("p", ctypes.c_void_p), ("i", ctypes.c_int64), ("f", ctypes.c_double))


class Launch(ctypes.Structure):
    _fields_ = (("fn", ctypes.c_void_p), ("args", ctypes.POINTER(Arg)))


Value = torch.Tensor | int | float | None


class Library:
    """A shared object with kernels: `Library(code).call("gather_rows", out, x, index, 3, 64)`."""

    def __init__(self, code: bytes | Path) -> None:
        if isinstance(code, bytes):
            with tempfile.NamedTemporaryFile(suffix=".so") as file:
                file.write(code)
                file.flush()
                self._lib = ctypes.CDLL(file.name)
        else:
            self._lib = ctypes.CDLL(str(code))

    def call(self, name: str, *values: Value) -> None:
        self.kernel(name)(pack_args(values))

    def kernel(self, name: str) -> Callable[[ctypes.Array[Arg]], None]:
        fn = self._lib[name]
        fn.restype = None
        return fn

    def set_threads(self, threads: int) -> None:
        self._lib.dc_set_threads(ctypes.c_int64(threads))

    def run(self, calls: Sequence[tuple[str, Sequence[Value]]], timed: bool = False) -> list[float]:
        """Run a list of (kernel, arguments) by one call; the seconds of each where `timed`."""
        args = [pack_args(values) for _, values in calls]
        launches = (Launch * len(calls))()
        for launch, (name, _), packed in zip(launches, calls, args, strict=True):
            launch.fn = ctypes.cast(self._lib[name], ctypes.c_void_p)
            launch.args = packed
        seconds = (ctypes.c_double * len(calls))()
        if timed:
            self._lib.dc_run_timed(launches, ctypes.c_int64(len(calls)), seconds)
        else:
            self._lib.dc_run(launches, ctypes.c_int64(len(calls)))
        return list(seconds)


def pack_args(values: Sequence[Value]) -> ctypes.Array[Arg]:
    args = (Arg * len(values))()
    for arg, value in zip(args, values, strict=True):
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous()
            arg.p = value.data_ptr()
        elif isinstance(value, float):
            arg.f = value
        elif value is None:
            arg.p = None
        else:
            arg.i = int(value)
    return args
