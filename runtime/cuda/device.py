"""One GPU: its context, memory, stream and code."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import byref, c_float, c_int, c_size_t, c_ulonglong, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.errors import DeviceError
from dcompile.runtime.cuda.driver import OUT_OF_MEMORY, WRONG_IMAGE, Driver

Bytes = npt.NDArray[np.uint8]
_MAJOR, _MINOR, _PROCESSORS, _SHARED = 75, 76, 16, 97
_THREADS, _SHARED_OF_PROCESSOR, _REGISTERS = 39, 81, 82
_DYNAMIC_SHARED = 8
_PLAIN_SHARED = 48 << 10
"""What a kernel may have of shared memory without asking."""
_NON_BLOCKING = 1


class Device:
    """A GPU with one stream, in its primary context, which torch would use too.

    Raises DeviceError where there is no driver or no such GPU.
    """

    def __init__(self, driver: Driver, ordinal: int = 0) -> None:
        self.driver, self.ordinal = driver, ordinal
        count, device = c_int(), c_int()
        driver.call("cuDeviceGetCount", byref(count))
        if ordinal >= count.value:
            raise DeviceError(
                f"this machine has {count.value} GPUs that can be used, not {ordinal + 1}",
                remedy="look at CUDA_VISIBLE_DEVICES and nvidia-smi, or compile with --target cpu",
            )
        driver.call("cuDeviceGet", byref(device), ordinal)
        self._device = device.value
        self.context = self._handle("cuDevicePrimaryCtxRetain", self._device)
        self.enter()
        self.stream = self._handle("cuStreamCreate", _NON_BLOCKING)

    def enter(self) -> None:
        """Make the context current in this thread; every public method of an executor does so first."""
        self.driver.call("cuCtxSetCurrent", self.context)

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.driver.call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode(errors="replace")

    @property
    def arch(self) -> int:
        """90 for sm_90."""
        return 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)

    @property
    def processors(self) -> int:
        return self._attribute(_PROCESSORS)

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one block may use."""
        return self._attribute(_SHARED)

    @property
    def processor(self) -> Mapping[str, int]:
        """What one streaming multiprocessor has: threads, bytes of shared memory, registers."""
        return {
            "threads": self._attribute(_THREADS),
            "shared": self._attribute(_SHARED_OF_PROCESSOR),
            "registers": self._attribute(_REGISTERS),
        }

    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        free, total = c_size_t(), c_size_t()
        self.driver.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate(self, size: int, what: str) -> int:
        """The address of `size` bytes, a multiple of 256; raises DeviceError, naming `what`."""
        out = c_ulonglong()
        status = self.driver.status("cuMemAlloc_v2", byref(out), max(size, 1))
        if status == OUT_OF_MEMORY:
            free, total = (each / 2**30 for each in self.free_memory())
            raise DeviceError(
                f"the GPU has no memory for {what}: {size / 2**30:.2f} GiB",
                where=f"{self.name}: {free:.2f} of {total:.2f} GiB are free",
                remedy="compile with a smaller --max-length or --batch, or free memory on the GPU",
            )
        if status:
            raise self.driver.error("cuMemAlloc_v2", status)
        return out.value

    def free(self, address: int) -> None:
        self.driver.call("cuMemFree_v2", address)

    def pinned(self, size: int) -> tuple[int, Bytes]:
        """Host memory that the GPU copies from and to while the host goes on: address and bytes."""
        out = c_void_p()
        self.driver.call("cuMemHostAlloc", byref(out), max(size, 1), 0)
        assert out.value is not None
        block = (ctypes.c_ubyte * max(size, 1)).from_address(out.value)
        view: Bytes = np.ctypeslib.as_array(block)
        view.fill(0)
        return out.value, view

    def free_pinned(self, address: int) -> None:
        self.driver.call("cuMemFreeHost", address)

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy from the host, in the stream's order."""
        if size:
            self.driver.call("cuMemcpyHtoDAsync_v2", target, source, size, self.stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy to the host, in the stream's order; there once the stream is waited for."""
        if size:
            self.driver.call("cuMemcpyDtoHAsync_v2", target, source, size, self.stream)

    def fill(self, target: int, value: int, size: int) -> None:
        if size:
            self.driver.call("cuMemsetD8Async", target, value, size, self.stream)

    def wait(self) -> None:
        """Until everything in the stream is done; raises DeviceError where a kernel failed."""
        self.driver.call("cuStreamSynchronize", self.stream)

    def event(self) -> int:
        return self._handle("cuEventCreate", 0)

    def record(self, event: int) -> None:
        self.driver.call("cuEventRecord", event, self.stream)

    def seconds(self, begin: int, end: int) -> float:
        """Between two events that are over."""
        out = c_float()
        self.driver.call("cuEventElapsedTime", byref(out), begin, end)
        return out.value / 1e3

    def module(self, image: bytes, where: str) -> int:
        """Load a cubin, or PTX, which the driver assembles."""
        out = c_void_p()
        status = self.driver.status("cuModuleLoadData", byref(out), image + b"\0")
        if status in WRONG_IMAGE:
            error = self.driver.error("cuModuleLoadData", status)
            raise DeviceError(
                f"the driver does not load a kernel on {self.name} (sm_{self.arch}): {error.what}",
                where=where,
                remedy="compile the model again for this GPU, or install a newer driver",
            )
        if status:
            raise self.driver.error("cuModuleLoadData", status)
        assert out.value is not None
        return out.value

    def function(self, module: int, entry: str, dynamic_shared: int = 0) -> int:
        """A kernel of a module, allowed the shared memory that it needs."""
        function = self._handle("cuModuleGetFunction", module, entry.encode())
        if dynamic_shared > _PLAIN_SHARED:
            self.driver.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, dynamic_shared)
        return function

    def _attribute(self, number: int) -> int:
        out = c_int()
        self.driver.call("cuDeviceGetAttribute", byref(out), number, self._device)
        return out.value

    def _handle(self, name: str, *arguments: Any) -> int:
        out = c_void_p()
        self.driver.call(name, byref(out), *arguments)
        assert out.value is not None, name
        return out.value
