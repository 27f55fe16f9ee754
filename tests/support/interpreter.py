"""Triton's interpreter, made to agree with the hardware, and made to notice what it would not.

Import this before anything that imports Triton, in a process of its own: `TRITON_INTERPRET` decides
what every `@triton.jit` in the process becomes.  Patched, for Triton 3.6 and 3.7:

* bfloat16: the interpreter multiplies raw bit patterns in `dot` and arithmetic, and truncates where
  the hardware rounds to nearest even;
* asserts and overflow of signed integers are reported, a NaN in argmax is refused;
* every load and store is checked against the tensors of the launch; two programs that touch one
  element, one of them writing, are a race, unless an atomic on one address orders them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as tri

Handle = tri.TensorHandle
Builder = tri.InterpreterBuilder
BF16 = tl.bfloat16


class Race(RuntimeError):
    """Two programs touch one element, and nothing orders them."""


class OutOfBounds(IndexError):
    """A program loads or stores outside the tensors of its launch."""


def widen(bits: Any) -> Any:
    """bfloat16 bit patterns, uint16, as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def narrow(x: Any) -> Any:
    """float32 to bfloat16 bit patterns, to nearest even, carries included."""
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    bits = flat.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return (
        np.where(np.isnan(flat), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(x))
    )


def is_bf16(x: object) -> bool:
    return (
        isinstance(x, Handle)
        and not isinstance(x.dtype, tl.pointer_type)
        and x.dtype.scalar == BF16
    )


def up(x: Any) -> Any:
    return Handle(widen(x.data), tl.float32) if is_bf16(x) else x


def down(x: Any) -> Any:
    return Handle(narrow(x.data), BF16) if x.data.dtype == np.float32 else x


def install() -> None:
    """Patch the interpreter of this process."""
    _fix_arithmetic()
    _fix_casts()
    _refuse_nan_in_argmax()
    tri.interpreter_builder.options = tri.InterpreterOptions(debug=True)
    # Otherwise every error of a kernel would come as text inside another.
    triton.knobs.compilation.front_end_debugging = True
    Checks().install()


def _fix_arithmetic() -> None:
    for name in (
        "binary_op",
        "unary_op",
        "create_fma",
        "create_clampf",
        "create_rsqrt",
        "create_idiv",
    ):
        _widened(name)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        # Not a BLAS product: there a row's bits depend on where in the tile it lies.
        x, y = (up(h).data.astype(np.float64) for h in (a, b))
        total = np.einsum("ik,kj->ij", x, y) + up(acc).data
        out = Handle(total.astype(up(acc).data.dtype), up(acc).dtype.scalar)
        return down(out) if is_bf16(acc) else out

    Builder.create_dot = create_dot
    old_splat = Builder.create_splat

    def create_splat(self: Any, kind: Any, x: Any) -> Any:
        # A comparison's handle says the dtype of what was compared.
        out = old_splat(self, kind, x)
        return Handle(out.data != 0, tl.int1) if x.data.dtype == np.bool_ else out

    Builder.create_splat = create_splat
    old_sum = tri.ReduceOps.sum

    def reduce_sum(self: Any, input: Any) -> Any:
        if input.dtype != BF16:
            return old_sum(self, input)
        total = np.sum(widen(input.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(total), input.dtype)

    tri.ReduceOps.sum = reduce_sum


def _widened(name: str) -> None:
    """Compute in float32 and round once, as the hardware does for a single operation."""
    old = getattr(Builder, name)

    def new(self: Any, *args: Any) -> Any:
        if any(is_bf16(a) for a in args):
            return down(old(self, *[up(a) for a in args]))
        return old(self, *args)

    setattr(Builder, name, new)


def _fix_casts() -> None:
    old_cast, old_float = Builder.cast_impl, Builder.create_fp_to_fp

    def cast(self: Any, x: Any, to: Any) -> Any:
        if is_bf16(x) and to.scalar != BF16:
            wide = Handle(widen(x.data), tl.float32)
            return wide if to.scalar == tl.float32 else old_cast(self, wide, to)
        if to.scalar == BF16 and not is_bf16(x):
            return Handle(narrow(x.data.astype(np.float32)), BF16)
        return old_cast(self, x, to)

    def float_to_float(self: Any, x: Any, to: Any, rounding: Any) -> Any:
        if to.scalar == BF16 or is_bf16(x):
            return cast(self, x, to)
        return old_float(self, x, to, rounding)

    Builder.cast_impl, Builder.create_fp_to_fp = cast, float_to_float
    Builder.get_bf16 = lambda self, x: Handle(narrow(np.array([x], np.float32)), BF16)


def _refuse_nan_in_argmax() -> None:
    old = tri.ReduceOps.min_max

    def min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        values = input.handle.data
        if idx_reduce_op is not None and values.dtype.kind == "f" and np.isnan(values).any():
            raise FloatingPointError("NaN reached argmax: hardware and interpreter disagree on it")
        return old(self, input, val_reduce_op, idx_reduce_op)

    tri.ReduceOps.min_max = min_max


class Memory:
    """The elements of one tensor: who last wrote and read each, and when; -1 for nobody."""

    def __init__(self, tensor: Any) -> None:
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        count = sum((n - 1) * stride for n, stride in pairs) + 1  # a view may have gaps
        self.size = tensor.element_size()
        self.low, self.high = tensor.data_ptr(), tensor.data_ptr() + count * self.size
        self.writer, self.written, self.reader, self.was_read = (
            np.full(count, -1, np.int64) for _ in range(4)
        )


class Checks:
    """Bounds and races of one launch after the other.

    Programs are numbered as they come; a program's time is how many atomics it has done.
    """

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.start()

    def start(self) -> None:
        """Forget the last launch."""
        self.numbers: dict[Any, int] = {}
        self.time: dict[int, int] = defaultdict(int)
        self.released: dict[int, dict[int, int]] = defaultdict(dict)  # by address
        self.acquired: dict[int, dict[int, int]] = defaultdict(dict)  # by program

    @property
    def program(self) -> int:
        return self.numbers.setdefault(tri.interpreter_builder.grid_idx, len(self.numbers))

    def places(self, pointers: Any, mask: Any, what: str) -> list[tuple[Memory, Any]]:
        """The elements that the mask lets through, all of which must be a tensor's of the launch."""
        every = np.asarray(pointers.data, dtype=np.uint64)
        on = np.broadcast_to(
            np.asarray(mask.data if isinstance(mask, Handle) else mask), every.shape
        )
        left = every.reshape(-1)[on.reshape(-1).astype(bool)].astype(np.int64)
        found = []
        for memory in self.memories:
            inside = (left >= memory.low) & (left + memory.size <= memory.high)
            if inside.any():
                found.append((memory, (left[inside] - memory.low) // memory.size))
                left = left[~inside]
        if left.size:
            raise OutOfBounds(f"{what} of {left.size} elements in program {self.program}")
        return found

    def ordered(self, who: Any, when: Any) -> int | None:
        """None where every access comes before what this program does now, else whose does not.

        An access does that is this program's own, or that an atomic on one address has ordered.
        """
        me = self.program
        foreign = (who != -1) & (who != me)
        if not foreign.any():
            return None
        pairs = np.stack((who[foreign], when[foreign]), -1)
        for author, time in np.unique(pairs, axis=0).tolist():
            if self.acquired[me].get(author, -1) < time:
                return author
        return None

    def read(self, places: list[tuple[Memory, Any]]) -> None:
        for memory, at in places:
            author = self.ordered(memory.writer[at], memory.written[at])
            if author is not None:
                raise Race(f"program {self.program} reads what program {author} wrote")
            memory.reader[at], memory.was_read[at] = self.program, self.time[self.program]

    def write(self, places: list[tuple[Memory, Any]]) -> None:
        for memory, at in places:
            author = self.ordered(memory.writer[at], memory.written[at])
            if author is not None:
                raise Race(f"programs {self.program} and {author} write one element")
            reader = self.ordered(memory.reader[at], memory.was_read[at])
            if reader is not None:
                raise Race(f"program {self.program} writes what program {reader} read")
            memory.writer[at], memory.written[at] = self.program, self.time[self.program]

    def atomic(self, places: list[tuple[Memory, Any]]) -> None:
        """Acquire what was released at this address, then release what this program did so far."""
        me = self.program
        for memory, indices in places:
            for at in indices.tolist():
                released = self.released[memory.low + at * memory.size]
                for author, time in released.items():
                    self.acquired[me][author] = max(time, self.acquired[me].get(author, -1))
                released.update(self.acquired[me])
                released[me] = self.time[me]
                memory.writer[at], memory.written[at] = me, self.time[me]
        self.time[me] += 1

    def install(self) -> None:
        old_load, old_store = Builder.create_masked_load, Builder.create_masked_store
        old_atomic = Builder.create_atomic_rmw
        checks = self

        def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            checks.read(checks.places(pointers, mask, "load"))
            return old_load(self, pointers, mask, *rest)

        def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            checks.write(checks.places(pointers, mask, "store"))
            return old_store(self, pointers, value, mask, *rest)

        def atomic(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            checks.atomic(checks.places(pointers, mask, "atomic"))
            return old_atomic(self, kind, pointers, value, mask, *rest)

        Builder.create_masked_load, Builder.create_masked_store = load, store
        Builder.create_atomic_rmw = atomic
        self._follow_launches()

    def _follow_launches(self) -> None:
        old_init, old_call = tri.GridExecutor._init_args_hst, tri.GridExecutor.__call__
        checks = self

        def init(self: Any, args: Any, kwargs: Any) -> Any:
            host_args, host_kwargs = old_init(self, args, kwargs)
            tensors = [t for t in (*host_args, *host_kwargs.values()) if hasattr(t, "data_ptr")]
            checks.memories = [Memory(t) for t in tensors if t.numel()]
            return host_args, host_kwargs

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            checks.start()
            return old_call(self, *args, **kwargs)

        tri.GridExecutor._init_args_hst, tri.GridExecutor.__call__ = init, call


install()
