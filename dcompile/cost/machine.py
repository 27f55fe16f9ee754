"""What this machine can do at best.

The rates are bounds: of a loop that does nothing but read weights, and of one that does nothing but multiply
and add (`codegen/cpu/probe.h`).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dcompile.codegen.cpu.build import build, library_headers, runnable
from dcompile.errors import BuildError
from dcompile.runtime import pages
from dcompile.runtime.processor import cpu_flags
from dcompile.runtime.weights import Array

_BUFFER = 256 << 20  # what is read: at least this, and three times the last cache
_PIECE = 16 << 20  # what one timing reads: a few milliseconds, so that a quiet one is found
# Places read from in turn, and how far ahead of each is asked for: the best differs from machine to machine.
_WAYS = ((1, 0), (2, 0), (4, 0), (8, 0), (1, 4096), (1, 16384), (4, 4096))
_ROUNDS = 20_000  # of the multiply-add probe: about a millisecond


@dataclass(frozen=True)
class Machine:
    """Measured bounds: bytes a second read from memory, FLOP a second."""

    bandwidth: float
    rate: float


def measure(dtype: str, threads: int) -> Machine:
    """The best of many runs of the probes, as vectorised code of the best variant that runs here.

    The rate is float32's, or for bfloat16 that of bf16 pairs or of AMX tiles where it is higher: wherever
    else a kernel widens, and with enough rows that costs nothing.  Raises BuildError without a C++ compiler.
    """
    probe = _probes()
    weights = _weights()
    pieces = range(0, weights.nbytes, _PIECE)
    reads = [
        probe.number("probe_read", weights.ctypes.data + at, _PIECE, *way, threads)
        for way in _WAYS
        for at in pieces
    ]
    names = ["probe_rate"]
    if dtype == "bfloat16":
        names += [name for name in ("probe_pairs", "probe_tiles") if probe.has(name)]
    rates = [probe.number(name, _ROUNDS, threads) for name in names for _ in range(60)]
    return Machine(_PIECE / min(reads), max(rates))


def _weights() -> Array:
    """What does not stay in a cache, in large pages where there are any, as weights are mapped.

    A buffer that the last cache holds would be read faster than weights ever are: by a fifth with the
    480 MiB of a Granite Rapids.
    """
    wanted = min(max(_BUFFER, 3 * last_cache()), max(_BUFFER, _free_memory() // 4))
    size = -(-wanted // _PIECE) * _PIECE
    weights = pages.zeros(size)
    weights.fill(1)
    return weights


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def last_cache() -> int:
    """Bytes of the largest cache that Linux lists; 0 where it lists none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1:]
        sizes.append(int(number) << {"K": 10, "M": 20}.get(unit, 0))
    return min(max(sizes), 1 << 30)


class _Probes:
    """The compiled probes."""

    def __init__(self, code: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(code)
            file.flush()
            self._library = ctypes.CDLL(file.name)

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    def number(self, name: str, *values: int) -> float:
        """What a probe finds: its first argument is where it writes that."""
        out = ctypes.c_double()
        arguments = (ctypes.addressof(out), *values)
        self._library[name]((ctypes.c_int64 * len(arguments))(*arguments))
        return out.value


@cache
def _probes() -> _Probes:
    isas = runnable(tuple(cpu_flags()))
    if not isas:
        raise BuildError("no variant of the probes runs on this processor")
    sources = {"probe.cpp": '#include "probe.h"\n', **library_headers()}
    return _Probes(build(sources, isas[:1])[isas[0]])
