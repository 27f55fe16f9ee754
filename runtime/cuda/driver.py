"""The CUDA driver's C functions through ctypes: just those that the runtime calls, each checked.

The symbols are those of CUDA 12; drivers keep exporting them. Structures are laid out as in cuda.h,
which a test compiles against. Nothing is loaded until a `Driver` is made.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    Union,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_longlong,
    c_size_t,
    c_uint,
    c_ulonglong,
    c_void_p,
)
from typing import Any

from dcompile.errors import DeviceError

LIBRARY = "libcuda.so.1"
OLDEST = 12000
CONDITIONAL_NODES = 12040
"""The first driver with WHILE nodes in graphs: CUDA 12.4."""
_NO_DEVICE = (100, 101)
OUT_OF_MEMORY = 2
WRONG_IMAGE = (200, 209, 218, 222)
"""Errors of a module that is damaged, for another architecture, or too new to be assembled."""


class KernelNode(Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = (
        ("func", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("params", POINTER(c_void_p)),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    )


class Side(Structure):
    """One half of CUDA_MEMCPY3D: where a copy reads or writes."""

    _fields_ = (
        ("x", c_size_t),
        ("y", c_size_t),
        ("z", c_size_t),
        ("lod", c_size_t),
        ("kind", c_int),
        ("host", c_void_p),
        ("device", c_ulonglong),
        ("array", c_void_p),
        ("reserved", c_void_p),
        ("pitch", c_size_t),
        ("height", c_size_t),
    )


class CopyNode(Structure):
    """CUDA_MEMCPY3D"""

    _fields_ = (
        ("source", Side),
        ("target", Side),
        ("width", c_size_t),
        ("height", c_size_t),
        ("depth", c_size_t),
    )


HOST, DEVICE = 1, 2


class Conditional(Structure):
    """CUDA_CONDITIONAL_NODE_PARAMS"""

    _fields_ = (
        ("handle", c_ulonglong),
        ("type", c_int),
        ("size", c_uint),
        ("graphs", POINTER(c_void_p)),
        ("context", c_void_p),
    )


class _Node(Union):
    _fields_ = (("reserved", c_longlong * 29), ("conditional", Conditional))


class GraphNode(Structure):
    """CUgraphNodeParams"""

    _fields_ = (
        ("type", c_int),
        ("reserved0", c_int * 3),
        ("node", _Node),
        ("reserved2", c_longlong),
    )


CONDITIONAL, WHILE, DEFAULT_AT_LAUNCH = 13, 1, 1

_Out = POINTER(c_void_p)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_Out, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemHostAlloc": (_Out, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_ulonglong, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_ulonglong, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (_Out, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (_Out, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuModuleLoadData": (_Out, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_Out, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, _Out, c_void_p),
    "cuGraphCreate": (_Out, c_uint),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphAddKernelNode_v2": (_Out, c_void_p, _Out, c_size_t, POINTER(KernelNode)),
    "cuGraphAddMemcpyNode": (_Out, c_void_p, _Out, c_size_t, POINTER(CopyNode), c_void_p),
    "cuGraphInstantiateWithFlags": (_Out, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
}
# Not in every driver that will do.
_NEWER: dict[str, tuple[Any, ...]] = {
    "cuGraphAddNode_v2": (_Out, c_void_p, _Out, c_void_p, c_size_t, POINTER(GraphNode)),
    "cuGraphConditionalHandleCreate": (
        POINTER(c_ulonglong),
        c_void_p,
        c_void_p,
        c_uint,
        c_uint,
    ),
}


class Driver:
    """The loaded driver; `call` is one of its functions, and raises DeviceError where it fails."""

    def __init__(self, library: str | None = None) -> None:
        name = library or LIBRARY
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise DeviceError(
                f"this machine has no NVIDIA driver: {name} cannot be loaded",
                where=str(error),
                remedy="install the driver, or compile with --target cpu",
            ) from error
        self._functions = {n: self._bind(n, types) for n, types in _FUNCTIONS.items()}
        self._functions |= {
            n: self._bind(n, types) for n, types in _NEWER.items() if hasattr(self._library, n)
        }
        self._text = self._bind("cuGetErrorString", (c_int, POINTER(c_char_p)))
        self.call("cuInit", 0)
        version = c_int()
        self.call("cuDriverGetVersion", byref(version))
        self.version = version.value
        if self.version < OLDEST:
            raise DeviceError(
                f"the NVIDIA driver is for CUDA {_dotted(self.version)}, which is too old",
                remedy=f"install one for CUDA {_dotted(OLDEST)} or newer",
            )

    @property
    def has_while(self) -> bool:
        """Whether a graph may hold a loop."""
        return self.version >= CONDITIONAL_NODES and _NEWER.keys() <= self._functions.keys()

    def _bind(self, name: str, types: tuple[Any, ...]) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            what = f"the NVIDIA driver is too old: it has no {name}"
            remedy = f"install one for CUDA {_dotted(OLDEST)} or newer"
            raise DeviceError(what, remedy=remedy) from error
        function.argtypes, function.restype = types, c_int
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver."""
        status = self._functions[name](*arguments)
        if status:
            raise self.error(name, status)

    def status(self, name: str, *arguments: Any) -> int:
        """Call a function of the driver and return its status, where the caller knows what it means."""
        return int(self._functions[name](*arguments))

    def function(self, name: str) -> Any:
        """The bare function, for launches in a loop; its status must be looked at."""
        return self._functions[name]

    def error(self, name: str, status: int) -> DeviceError:
        """What a status other than 0 means."""
        text = c_char_p()
        self._text(status, byref(text))
        meaning = (text.value or b"unknown error").decode(errors="replace")
        if status in _NO_DEVICE:
            return DeviceError(
                "this machine has an NVIDIA driver but no GPU that it can use",
                where=f"{name}: {meaning}",
                remedy="look at CUDA_VISIBLE_DEVICES and nvidia-smi, or compile with --target cpu",
            )
        if status == OUT_OF_MEMORY:
            return DeviceError(
                "the GPU has too little free memory",
                where=name,
                remedy="compile with a smaller --max-length or --batch, or free memory on the GPU",
            )
        return DeviceError(f"the GPU's driver refuses: {meaning} ({status})", where=name)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
