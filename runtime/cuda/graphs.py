"""CUDA graphs, built node after node: launches, copies, and a loop that the GPU runs by itself.

A loop is a conditional node of type WHILE (CUDA 12.4): its body runs while a condition is not zero, and
the body's last kernel sets the condition. No kernel written in Triton can, so that one is PTX, which the
driver assembles for any GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.driver import (
    CONDITIONAL,
    DEFAULT_AT_LAUNCH,
    DEVICE,
    HOST,
    WHILE,
    CopyNode,
    GraphNode,
    KernelNode,
    Side,
)

SET_CONDITION = """\
.version 8.4
.target sm_80
.address_size 64
.extern .func cudaGraphSetConditional (.param .b64 handle, .param .b32 value);
.visible .entry set_condition(.param .u64 handle, .param .u64 go)
{
  .reg .b32 %r<2>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [handle];
  ld.param.u64 %rd2, [go];
  cvta.to.global.u64 %rd3, %rd2;
  ld.global.u32 %r1, [%rd3];
  {
    .param .b64 p0;
    .param .b32 p1;
    st.param.b64 [p0], %rd1;
    st.param.b32 [p1], %r1;
    call.uni cudaGraphSetConditional, (p0, p1);
  }
  ret;
}
"""
"""set_condition(handle, go): the loop of `handle` goes on while the int32 at `go` is not 0."""


@dataclass(frozen=True)
class Call:
    """A kernel with its grid and its arguments packed; `pointers` name each of them in `bytes`."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    pointers: Any
    bytes: Any
    name: str

    def launch(self, cu_launch: Callable[..., int], stream: int) -> int:
        """Put it into the stream; the driver's status."""
        x, y, z = self.grid
        return cu_launch(
            self.function, x, y, z, self.threads, 1, 1, self.shared, stream, self.pointers, None
        )


@dataclass(frozen=True)
class Copy:
    """Between host and GPU: addresses and bytes."""

    target: int
    source: int
    size: int
    to_device: bool


class Graph:
    """A graph in the making; each node runs after the one before it."""

    def __init__(self, device: Device, graph: int | None = None) -> None:
        self.device = device
        out = c_void_p()
        if graph is None:
            device.driver.call("cuGraphCreate", byref(out), 0)
            graph = out.value
        self.graph = graph
        self._last: c_void_p | None = None

    def kernel(self, call: Call) -> None:
        node = KernelNode(
            func=call.function,
            grid=(c_uint * 3)(*call.grid),
            block=(c_uint * 3)(call.threads, 1, 1),
            shared=call.shared,
            params=ctypes.cast(call.pointers, POINTER(c_void_p)),
        )
        self._add("cuGraphAddKernelNode_v2", byref(node))

    def copy(self, copy: Copy) -> None:
        host = Side(kind=HOST, host=copy.source if copy.to_device else copy.target)
        device = Side(kind=DEVICE, device=copy.target if copy.to_device else copy.source)
        source, target = (host, device) if copy.to_device else (device, host)
        # A row as long as the copy: the driver looks at no pitch then.
        node = CopyNode(source=source, target=target, width=copy.size, height=1, depth=1)
        self._add("cuGraphAddMemcpyNode", byref(node), self.device.context)

    def loop(self) -> tuple[Graph, int]:
        """A loop that is entered once at least: its body, to be filled, and its handle."""
        handle = c_ulonglong()
        driver, context = self.device.driver, self.device.context
        driver.call(
            "cuGraphConditionalHandleCreate",
            byref(handle),
            self.graph,
            context,
            1,
            DEFAULT_AT_LAUNCH,
        )
        node = GraphNode(type=CONDITIONAL)
        inner = node.node.conditional
        inner.handle, inner.context = handle.value, context
        inner.type, inner.size = WHILE, 1
        out, before, count = c_void_p(), *self._dependencies()
        driver.call("cuGraphAddNode_v2", byref(out), self.graph, before, None, count, byref(node))
        self._last = out
        return Graph(self.device, inner.graphs[0]), handle.value

    def instantiate(self) -> Instance:
        """The graph as the GPU runs it; what it was made from goes."""
        out = c_void_p()
        try:
            self.device.driver.call("cuGraphInstantiateWithFlags", byref(out), self.graph, 0)
        finally:
            self.device.driver.call("cuGraphDestroy", self.graph)
        assert out.value is not None
        return Instance(self.device, out.value)

    def _add(self, name: str, *parameters: Any) -> None:
        out, before, count = c_void_p(), *self._dependencies()
        self.device.driver.call(name, byref(out), self.graph, before, count, *parameters)
        self._last = out

    def _dependencies(self) -> tuple[Any, int]:
        return (None, 0) if self._last is None else (byref(self._last), 1)


@dataclass
class Instance:
    """A graph that can be launched."""

    device: Device
    handle: int

    def launch(self) -> None:
        self.device.driver.call("cuGraphLaunch", self.handle, self.device.stream)

    def close(self) -> None:
        self.device.driver.call("cuGraphExecDestroy", self.handle)


def packed(values: Sequence[bytes], layout: Sequence[tuple[int, int, int]]) -> tuple[Any, Any]:
    """Arguments as the driver takes them: an array of pointers into bytes that hold each at its offset."""
    end = layout[-1][1] + layout[-1][2]
    block = (ctypes.c_ubyte * (end + 8))()
    base = ctypes.addressof(block)
    pointers = (c_void_p * len(layout))()
    for (ordinal, offset, size), value in zip(layout, values, strict=True):
        assert len(value) == size
        ctypes.memmove(base + offset, value, size)
        pointers[ordinal] = base + offset
    return pointers, block
