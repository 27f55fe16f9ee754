"""A lowering on a device: kernels loaded, operands and scratch placed, ready to be launched and timed."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from dcompile.codegen.triton.aot import Compiled
from dcompile.codegen.triton.variant import Lowering, Number, Operand, Step, evaluate
from dcompile.errors import DeviceError
from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.graphs import Call, packed
from dcompile.runtime.cuda.table import SCALARS, Argument, layout

FLUSH = 256 << 20  # more than any last-level cache


class Placed:
    """One lowering with its operands on `device`; tensors that torch has on the GPU are used in place.

    `close` gives everything back.
    """

    def __init__(
        self,
        device: Device,
        lowering: Lowering,
        compiled: Sequence[Compiled],
        operands: Mapping[str, Tensor],
        symbols: Mapping[str, int],
    ) -> None:
        self.device = device
        device.enter()
        self._owned: list[int] = []
        self._modules: list[int] = []
        self._operands = dict(operands)
        self._places = {name: self._place(tensor) for name, tensor in operands.items()}
        for scratch in lowering.scratch:
            size = evaluate(scratch.elements, symbols) * scratch.item_bytes
            address = self._allocate(size)
            # What is not zeroed is never read before it is written: any bytes will do.
            device.fill(address, 0 if scratch.zeroed else 0xFF, size)
            self._places[f"scratch {scratch.name}"] = address
        by_name = {one.variant.name: one for one in compiled}
        calls = [self._call(step, by_name[step.variant.name], symbols) for step in lowering.steps]
        self.calls = [call for call in calls if call is not None]
        device.wait()

    def launch(self) -> None:
        """Put every kernel into the stream."""
        cu_launch = self.device.driver.function("cuLaunchKernel")
        for call in self.calls:
            status = call.launch(cu_launch, self.device.stream)
            if status:
                error = self.device.driver.error("cuLaunchKernel", status)
                raise DeviceError(error.what, where=f"kernel {call.name}")

    def seconds(self, rounds: int, flush: int | None = None) -> list[float]:
        """Times of `rounds` launches after two to warm up, each with cold caches where `flush` is memory."""
        begin, end = self.device.event(), self.device.event()
        times = []
        try:
            for turn in range(rounds + 2):
                if flush is not None:
                    self.device.fill(flush, turn & 0xFF, FLUSH)
                self.device.record(begin)
                self.launch()
                self.device.record(end)
                self.device.wait()
                if turn >= 2:
                    times.append(self.device.seconds(begin, end))
        finally:
            for event in (begin, end):
                self.device.driver.call("cuEventDestroy_v2", event)
        return times

    def result(self, name: str) -> Tensor:
        """An operand as it is now, on the host."""
        tensor = self._operands[name]
        self.device.wait()
        if tensor.is_cuda:
            return tensor.cpu()
        out = torch.empty_like(tensor)
        self.device.download(out.data_ptr(), self._places[name], out.numel() * out.element_size())
        self.device.wait()
        return out

    def close(self) -> None:
        self.device.wait()
        for address in self._owned:
            self.device.free(address)
        for module in self._modules:
            self.device.driver.call("cuModuleUnload", module)
        self._owned, self._modules = [], []

    def _allocate(self, size: int) -> int:
        address = self.device.allocate(size, "a kernel's operands")
        self._owned.append(address)
        return address

    def _place(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            raise ValueError("operands are contiguous")
        if tensor.is_cuda:
            torch.cuda.synchronize()
            return tensor.data_ptr()
        size = prod(tensor.shape) * tensor.element_size()
        address = self._allocate(size)
        self.device.upload(address, tensor.data_ptr(), size)
        self.device.wait()
        return address

    def _call(self, step: Step, made: Compiled, symbols: Mapping[str, int]) -> Call | None:
        x, y, z = (evaluate(axis, symbols) for axis in step.variant.grid)
        if 0 in (x, y, z):
            return None
        module = self.device.module(made.cubin, made.variant.name)
        self._modules.append(module)
        function = self.device.function(module, made.entry, made.dynamic_shared)
        arguments = [Argument(p.name, p.type, p.aligned) for p in step.variant.arguments]
        values = []
        for argument, binding in zip(arguments, step.bindings, strict=True):
            if isinstance(binding, Number):
                number = binding.value
                value = number if isinstance(number, float) else evaluate(number, symbols)
                values.append(struct.pack("<" + SCALARS[argument.type], value))
            else:
                stem = "" if isinstance(binding, Operand) else "scratch "
                values.append(struct.pack("<Q", self._places[stem + binding.name]))
        pointers, data = packed([*values, bytes(8), bytes(8)], layout(arguments))
        threads, shared = 32 * made.warps, made.dynamic_shared
        return Call(function, (x, y, z), threads, shared, pointers, data, made.variant.name)
