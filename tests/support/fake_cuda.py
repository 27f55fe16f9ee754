"""A CUDA driver without a GPU for tests: `fake_cuda.c` compiled, its kernels Python functions.

`make_cubin` writes ELF files that say of their kernel what a compiler's would, without any code in them.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.runtime.cuda.device import Device
from dcompile.runtime.cuda.driver import Driver

SOURCE = Path(__file__).with_name("fake_cuda.c")
ATTRIBUTES = {16: 132, 39: 2048, 81: 233472, 82: 65536, 97: 232448}
_Hook = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass(frozen=True)
class Launched:
    """A kernel as it was launched; `value` reads an argument."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    params: Any

    def value(self, index: int, type_: Any) -> Any:
        return type_.from_address(self.params[index]).value

    def array(self, index: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        """The memory that an argument points to."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        address = self.value(index, ctypes.c_uint64)
        block = (ctypes.c_ubyte * (count * kind.itemsize)).from_address(address)
        return np.frombuffer(block, kind, count).reshape(shape)


Kernel = Callable[[Launched], None]


@dataclass
class FakeCuda:
    """One loaded copy of the fake driver, with memory, clock and log of its own."""

    library: Path
    arch: int = 90
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    """By the entry's name."""
    by_digest: dict[int, Kernel] = field(default_factory=dict)
    """By the module that it is in; these come first."""
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.c = ctypes.CDLL(str(self.library))
        self.c.fake_log.restype = ctypes.c_char_p
        self.c.fake_extent.restype = ctypes.c_size_t
        self.c.fake_digest.restype = ctypes.c_uint64
        attributes = (ctypes.c_int * 256).in_dll(self.c, "fake_attributes")
        for number, value in {**ATTRIBUTES, 75: self.arch // 10, 76: self.arch % 10}.items():
            attributes[number] = value
        self._attributes = attributes
        self._hook = _Hook(self._call)
        ctypes.c_void_p.in_dll(self.c, "fake_hook").value = ctypes.cast(
            self._hook, ctypes.c_void_p
        ).value

    def _call(
        self, name: bytes, digest: int, grid: Any, threads: int, shared: int, params: Any
    ) -> None:
        if self.errors:
            return
        try:
            kernel = self.by_digest.get(digest) or self.kernels[name.decode()]
            kernel(Launched(name.decode(), (grid[0], grid[1], grid[2]), threads, shared, params))
        except BaseException as error:  # C cannot raise it
            self.errors.append(error)
            self.set("turns", 0)  # nothing ends a loop any more

    @contextmanager
    def raising(self) -> Iterator[None]:
        """What a kernel raised inside is raised at the end, and comes before what followed from it."""
        try:
            yield
        finally:
            if self.errors:
                raise self.errors[0]

    def digest(self, image: bytes) -> int:
        """What a module of these bytes is known by."""
        return int(self.c.fake_digest(image, ctypes.c_size_t(len(image))))

    def extent(self, address: int) -> int:
        """Bytes from an address to the end of the memory that it lies in."""
        return int(self.c.fake_extent(ctypes.c_void_p(address)))

    def set(self, name: str, value: int) -> None:
        """A setting of fake_cuda.c, without its prefix."""
        ctypes.c_int.in_dll(self.c, f"fake_{name}").value = value

    def set_memory(self, size: int) -> None:
        ctypes.c_size_t.in_dll(self.c, "fake_memory").value = size

    def attribute(self, number: int, value: int) -> None:
        self._attributes[number] = value

    def spend(self, milliseconds: float) -> None:
        """Let a kernel take longer than the millisecond that each takes."""
        ctypes.c_double.in_dll(self.c, "fake_milliseconds").value += milliseconds

    @property
    def log(self) -> list[str]:
        return self.c.fake_log().decode().splitlines()

    def forget(self) -> None:
        self.c.fake_forget()

    @property
    def live(self) -> int:
        """Allocations, modules, graphs and events that nobody gave back."""
        return int(self.c.fake_live())

    def driver(self) -> Driver:
        return Driver(str(self.library))

    def device(self) -> Device:
        return Device(self.driver())


def build(folder: Path) -> Path:
    """Compile the fake driver against Triton's copy of cuda.h."""
    out = folder / "libcuda_fake.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{_headers()}", "-o", str(out)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return out


def load(built: Path, folder: Path, arch: int = 90) -> FakeCuda:
    """A copy of its own: a library that is loaded twice from one path is one."""
    copy = folder / "libcuda.so.1"
    shutil.copy(built, copy)
    return FakeCuda(copy, arch)


def _headers() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def make_cubin(
    entry: str,
    sizes: Sequence[int],
    *,
    arch: int = 90,
    registers: int = 32,
    stack: int = 0,
    static_shared: int = 0,
) -> bytes:
    """An ELF file that describes a kernel with parameters of these sizes; it holds no code."""
    records, at = b"", 0
    for ordinal, size in enumerate(sizes):
        at += -at % size
        records += struct.pack("<BBHIHHI", 4, 0x17, 12, 0, ordinal, at, size << 18 | 0xFFF)
        at += size
    by_function = struct.pack("<BBHII", 4, 0x2F, 8, 1, registers)
    by_function += struct.pack("<BBHII", 4, 0x11, 8, 1, stack)
    strings = b"\0" + entry.encode() + b"\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 0, 0, 0)
    bodies = {
        "": b"",
        ".symtab": symbols,
        ".strtab": strings,
        ".nv.info": by_function,
        f".nv.info.{entry}": records,
        f".nv.shared.{entry}": b"",
        ".shstrtab": b"",
    }
    names = b"".join(name.encode() + b"\0" for name in bodies)
    bodies[".shstrtab"] = names
    data, headers, name_at = b"", b"", 0
    for name, body in bodies.items():
        kind = 8 if name.startswith(".nv.shared") else 3 if name else 0
        size = static_shared if kind == 8 else len(body)
        headers += struct.pack("<IIQQQQIIQQ", name_at, kind, 0, 0, 64 + len(data), size, 0, 0, 1, 0)
        data += body
        name_at += len(name) + 1
    start = 64 + len(data)
    head = b"\x7fELF\x02\x01\x01\x33\x07" + bytes(7)
    head += struct.pack("<HHIQQQI", 2, 190, 1, 0, 0, start, 0x500500 | arch)
    head += struct.pack("<HHHHHH", 64, 0, 0, 64, len(bodies), len(bodies) - 1)
    return head + data + headers
