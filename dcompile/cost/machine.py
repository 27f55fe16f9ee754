"""What a step must at least read and multiply, launch by launch, and what this machine can do at best.

The rates are bounds: of a loop that does nothing but read weights, and of one that does nothing but multiply
and add (`codegen/cpu/probe.h`).  What stays in a cache is not counted: activations, and K/V rows just written.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dcompile.codegen.cpu.build import build, library_headers, runnable
from dcompile.errors import BuildError
from dcompile.ir.sizes import evaluate
from dcompile.runtime import pages
from dcompile.runtime.backend import Backend
from dcompile.runtime.processor import cpu_flags
from dcompile.runtime.state import Binding
from dcompile.runtime.weights import Array

BYTES = {"f32": 4, "bf16": 2, "f16": 2}
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


@dataclass(frozen=True)
class Cost:
    """What one launch must do."""

    bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        return max(self.bytes / machine.bandwidth, self.flops / machine.rate)


@dataclass(frozen=True)
class LaunchCost(Cost):
    """The same with the launch's name."""

    name: str


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


def touched_experts(executor: Backend, binding: Binding) -> dict[str, int]:
    """How many experts each `moe_ffn` of one step reads, by launch name; the step is run for it."""
    counts, at = {}, 0
    for index, launch in enumerate(executor.plan.launches):
        if not (launch.native and launch.kernel.startswith("moe_ffn_")):
            continue
        executor.launch(binding, part=(at, index))
        at = index
        # An expert of -1 was lost to a limit.
        chosen = np.unique(binding.values(launch.args[3]["b"]))
        counts[launch.name] = int((chosen >= 0).sum())
    executor.launch(binding, part=(at, len(executor.plan.launches)))
    return counts


def step_cost(
    plan: Mapping[str, Any],
    R: int,
    B: int,
    live: int,
    keys: int,
    touched: Mapping[str, int] | None = None,
) -> list[LaunchCost]:
    """Cost of each native launch with a weight or a cache in it, for R rows and `live` candidates.

    `keys` is how many keys a row attends to, `touched` the experts that each moe_ffn read in a run
    (`touched_experts`).  Without it they are what uniform routing reads, E (1 - (1 - k / E)^R): for plans that
    have not run; a real router reads fewer.
    """
    out = []
    for launch in plan["launches"]:
        if launch["where"] != "native":
            continue
        family, _, end = launch["kernel"].rpartition("_")
        counter = _COUNTERS.get(family)
        if counter is None:
            continue
        sizes = [evaluate(a["i"], {"R": R, "B": B}) for a in launch["args"] if "i" in a]
        moved, flops = counter(sizes, _Step(B, live, keys, (touched or {}).get(launch["name"])))
        out.append(LaunchCost(moved * BYTES.get(end, 4), flops, launch["name"]))
    return out


@dataclass(frozen=True)
class _Step:
    sequences: int
    live: int
    keys: int
    touched: int | None


# Elements of weights and caches read, and FLOP, of a launch with these sizes.
_Counter = Callable[[list[int], _Step], tuple[float, float]]


def _linear(sizes: list[int], step: _Step) -> tuple[float, float]:
    rows, n, k = sizes
    return n * k, 2 * rows * n * k


def _moe_ffn(sizes: list[int], step: _Step) -> tuple[float, float]:
    rows, d, f, experts, k, _ = sizes
    touched = experts * (1 - (1 - k / experts) ** rows) if step.touched is None else step.touched
    return touched * 3 * d * f, 6 * rows * k * d * f


def _vocab_choice(sizes: list[int], step: _Step) -> tuple[float, float]:
    _, _, v, d, *_ = sizes
    return v * d, 2 * step.live * v * d


def _soft_embed(sizes: list[int], step: _Step) -> tuple[float, float]:
    # How many of the rows are masks is not known here: at least the candidates.
    _, v, d, e, _ = sizes
    return v * (d + e), 2 * step.live * v * (d + e)


def _attend(sizes: list[int], step: _Step) -> tuple[float, float]:
    rows, heads, groups, d, _ = sizes
    kept = max(0, step.keys * max(step.sequences, 1) - rows)  # the rows' own were written just now
    return 2 * kept * groups * d, 4 * rows * heads * d * step.keys


_COUNTERS: Mapping[str, _Counter] = {
    "linear": _linear,
    "moe_ffn": _moe_ffn,
    "soft_embed": _soft_embed,
    "vocab_choice": _vocab_choice,
    "vocab_choice_asked": _vocab_choice,
    "attend": _attend,
}
