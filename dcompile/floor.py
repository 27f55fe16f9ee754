"""What a step must at least read and multiply, launch by launch, and what this machine can do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcompile.ir.sizes import evaluate

BYTES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class Machine:
    """Measured rates: bytes a second read from memory, FLOP a second of a large product."""

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Cost:
    bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        return max(self.bytes / machine.bandwidth, self.flops / machine.rate)


def measure(dtype: torch.dtype, threads: int) -> Machine:
    """Best of several runs: large sums and dot products (bandwidth), products of 1024^3 (rate).

    The rate is the better of `dtype` and float32: a kernel may widen, and on some machines wins by it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, two = torch.ones(64 << 20), torch.ones(64 << 20)
        size = one.numel() * 4
        read = max(
            size / _best(lambda: one.sum(), 5), 2 * size / _best(lambda: torch.dot(one, two), 5)
        )
        rates = []
        for kind in {dtype, torch.float32}:
            a, b = (torch.randn(1024, 1024).to(kind) for _ in range(2))
            rates.append(2 * 1024**3 / _best(lambda a=a, b=b: a @ b, 9))
        return Machine(read, max(rates))
    finally:
        torch.set_num_threads(before)


def _best(call, times: int) -> float:  # type: ignore[no-untyped-def]
    call()
    out = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return min(out)


def step_cost(plan: Mapping[str, Any], R: int, B: int, live: int, keys: int) -> list[Cost]:
    """Cost of each native launch with a weight or a cache in it, for R rows and `live` candidates.

    `keys` is how many keys a row attends to.  Experts touched are those of uniform routing,
    E (1 - (1 - k / E)^R): a skewed router reads less.
    """
    out = []
    for launch in plan["launches"]:
        if launch["where"] != "native":
            continue
        family, _, end = launch["kernel"].rpartition("_")
        sizes = [evaluate(a["i"], {"R": R, "B": B}) for a in launch["args"] if "i" in a]
        size = BYTES.get(end, 4)
        if family == "linear":
            rows, n, k = sizes
            out.append(Cost(size * (n * k + rows * (n + k)), 2 * rows * n * k))
        elif family == "moe_ffn":
            rows, d, f, experts, k, _ = sizes
            touched = experts * (1 - (1 - k / experts) ** rows)
            out.append(Cost(size * (touched * 3 * d * f + 2 * rows * d), 6 * rows * k * d * f))
        elif family in ("vocab_choice", "vocab_choice_asked"):
            _, _, v, d, *_ = sizes
            out.append(Cost(size * (v * d + live * d), 2 * live * v * d))
        elif family == "attend":
            rows, heads, groups, d, _ = sizes
            sequences = max(B, 1)
            cache = 2 * sequences * keys * groups * d * size
            out.append(Cost(cache + 2 * rows * heads * d * size, 4 * rows * heads * d * keys))
    return out
