"""Bytes moved and FLOPs done by every launch of an iteration, from the plan and what the iteration ran over.

Bytes are those that a launch must read and write once: the rows of a table that are asked for, the
keys that a sequence's rows attend to, the experts that have a token. A product of [R, K] and [K, N]
is 2 R N K operations; small operators count one an element for each operation of their formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dcompile.cost import cuda as cuda_cost
from dcompile.cost.machine import Cost, Machine
from dcompile.ir.sizes import evaluate
from dcompile.runtime.weights import DTYPES

Plan = Mapping[str, Any]
Ints = npt.NDArray[np.int64]
_SIZES = {"f32": 4, "bf16": 2, "f16": 2}
_PRODUCTS = ("aten.linear.", "aten.mm.", "aten.bmm.", "aten.matmul.")


@dataclass(frozen=True)
class Facts:
    """What one iteration ran over: keys seen and slot of each row, and what its launches chose."""

    R: int
    B: int
    limits: Ints
    sequences: Ints
    chosen: Ints | None
    experts: Mapping[int, Ints]
    """Launch that routed -> experts [rows, k]."""
    live: Mapping[int, int]
    """Launch that chooses tokens -> candidates that were still undecided."""

    def keys(self, rows: int) -> tuple[int, int]:
        """Keys seen by all rows together, and keys that memory gives: each slot's once.

        An attention over fewer rows than the step's is over those that choose tokens.
        """
        limits, sequences = self.limits, self.sequences
        if rows != self.R and self.chosen is not None:
            limits, sequences = limits[self.chosen], sequences[self.chosen]
        read = sum(int(limits[sequences == slot].max()) for slot in np.unique(sequences))
        return int(limits.sum()), read


@dataclass(frozen=True)
class Work:
    """A launch's bytes and FLOPs; `touched` counts experts, where it runs any.

    `streamed` are the bytes that no cache can have kept, as `machine.py` counts them: weights of a product,
    and keys and values that were not written just now.
    """

    bytes: float
    flops: float
    streamed: float = 0
    touched: int | None = None

    def seconds(self, machine: Machine) -> float:
        """The floor: no machine of these rates is faster."""
        return Cost(self.streamed, self.flops).seconds(machine)


class Call:
    """One launch with its sizes evaluated."""

    def __init__(self, plan: Plan, at: int, facts: Facts, routed: int | None) -> None:
        self.plan, self.at, self.facts, self.routed = plan, at, facts, routed
        self.launch = plan["launches"][at]
        self.symbols = {"R": facts.R, "B": facts.B}
        self.sizes = [evaluate(a["i"], self.symbols) for a in self.flat() if "i" in a]
        self.family = family(self.launch["kernel"])

    def flat(self) -> Iterator[dict[str, Any]]:
        return (arg for arg in flat_arguments(self.launch) if isinstance(arg, dict))

    def buffers(self) -> list[int]:
        """Every buffer once, written ones among them."""
        read = [arg["b"] for arg in self.flat() if arg.get("b") is not None]
        return list(dict.fromkeys([*read, *(w for w in self.launch["writes"] if w is not None)]))

    def shape(self, buffer: int) -> list[int]:
        return [evaluate(size, self.symbols) for size in self.plan["buffers"][buffer]["shape"]]

    def elements(self, buffer: int) -> int:
        return prod(self.shape(buffer))

    def itemsize(self, buffer: int) -> int:
        return DTYPES[self.plan["buffers"][buffer]["dtype"]].itemsize

    def bytes(self, index: int) -> int:
        """Of the argument at `index`, a buffer; none where it is null."""
        buffer = self.launch["args"][index]["b"]
        return 0 if buffer is None else self.elements(buffer) * self.itemsize(buffer)

    @property
    def size(self) -> int:
        """Bytes of an element of the first argument."""
        return self.itemsize(self.launch["args"][0]["b"])


def family(kernel: str) -> str:
    """linear_bf16 -> linear"""
    stem, _, end = kernel.rpartition("_")
    return stem if end in _SIZES else kernel


def flat_arguments(launch: Mapping[str, Any]) -> Iterator[Any]:
    waiting = [*launch["args"], *launch.get("kwargs", {}).values()]
    while waiting:
        arg = waiting.pop(0)
        if isinstance(arg, list):
            waiting = [*arg, *waiting]
        else:
            yield arg


def costs(plan: Plan, facts: Facts) -> list[Work]:
    """The cost of each launch, in the plan's order."""
    out = []
    for at, routed in enumerate(routers(plan)):
        call = Call(plan, at, facts, routed)
        of_cuda = cuda_cost.FORMULAS.get(call.launch.get("function", ""))
        if of_cuda is not None:
            out.append(of_cuda(cuda_cost.Named(call), Work))
        else:
            out.append(_FORMULAS.get(call.family, _other)(call))
    return out


def routers(plan: Plan) -> list[int | None]:
    """For each launch, the one that chose the experts that it reads."""
    chose: dict[int, int] = {}
    out: list[int | None] = []
    sorted_by: int | None = None
    for at, launch in enumerate(plan["launches"]):
        if launch.get("function") in ("moe_ffn:gate_up", "moe_ffn:down"):
            # They read the order that the launch before made of the experts.
            out.append(sorted_by)
            continue
        read = [arg["b"] for arg in flat_arguments(launch) if isinstance(arg, dict) and "b" in arg]
        found = [chose[b] for b in read if b in chose and b not in launch["writes"]]
        out.append(found[0] if found else None)
        sorted_by = out[-1] if launch.get("function") == cuda_cost.SORT else sorted_by
        if (buffer := chosen_experts(plan, launch)) is not None:
            chose[buffer] = at
    return out


def is_router(launch: Mapping[str, Any]) -> bool:
    if "function" in launch:
        return launch["function"] in (*cuda_cost.ROUTERS, *cuda_cost.LIMITED)
    return family(launch["kernel"]).startswith("route")


def chosen_experts(plan: Plan, launch: Mapping[str, Any]) -> int | None:
    """The buffer i32 [rows, k] that a router writes."""
    if not is_router(launch):
        return None
    return next((w for w in launch["writes"] if plan["buffers"][w]["dtype"] == "i32"), None)


def live_candidates(plan: Plan, launch: Mapping[str, Any]) -> int | None:
    """The buffer that says which candidates the choice of tokens is asked for."""
    if "function" in launch:
        return launch["named"]["live"]["b"] if launch["function"] == cuda_cost.CHOICE else None
    if not family(launch["kernel"]).startswith("vocab_choice"):
        return None
    read = [arg["b"] for arg in flat_arguments(launch) if arg.get("b") is not None]
    flags = ("bool", "u8")
    return next((b for b in read if plan["buffers"][b]["dtype"] in flags), None)


def _linear(call: Call) -> Work:
    rows, n, k = call.sizes[-3:]
    moved = sum(call.bytes(i) for i in range(5))
    return Work(moved, 2 * rows * n * k, call.bytes(2) + call.bytes(3))


def _moe_ffn(call: Call) -> Work:
    rows, d, f, experts, k = call.sizes[:5]
    chosen = None if call.routed is None else call.facts.experts.get(call.routed)
    # Without a look at the router: uniform routing.
    touched = (
        experts * (1 - (1 - k / experts) ** rows)
        if chosen is None
        else len(np.unique(chosen[chosen >= 0]))
    )
    weights = (call.bytes(4) + call.bytes(5)) * touched / experts
    moved = weights + sum(call.bytes(i) for i in range(4))
    return Work(moved, 6 * rows * k * d * f, weights, None if chosen is None else int(touched))


def _vocab_choice(call: Call) -> Work:
    candidates, _, v, d = call.sizes[:4]
    live = call.facts.live.get(call.at, candidates)
    skipped = (candidates - live) * d * _SIZES[call.launch["kernel"].rpartition("_")[2]]
    return Work(sum(_moved(call)) - skipped, 2 * live * v * d, sum(_moved(call, "weight")))


def _soft_embed(call: Call) -> Work:
    # How many rows are still masks is not looked at: those that choose tokens, at least.
    rows, v, d, e = call.sizes[:4]
    live = min(rows, sum(call.facts.live.values()))
    return Work(sum(_moved(call)), 2 * live * v * (d + e), sum(_moved(call, "weight")))


def _attend(call: Call) -> Work:
    rows, heads, groups, d = call.sizes[:4]
    seen, read = call.facts.keys(rows)
    cache = call.itemsize(call.launch["args"][2]["b"]) * 2 * read * groups * d
    kept = cache * max(0, read - call.facts.R) / max(read, 1)
    return Work(call.bytes(0) + call.bytes(1) + cache, 4 * seen * heads * d, kept)


def _norm_rope_write(call: Call) -> Work:
    rows, heads, groups, d, _, rotated = call.sizes[:6]
    written = rows * (heads + 2 * groups) * d * call.size
    tables = 2 * rows * rotated * 4
    turned = rows * (heads + groups) * (4 * d + 3 * rotated)
    return Work(call.bytes(3) + written + tables, turned)


def _embedding(call: Call) -> Work:
    return Work(2 * call.bytes(0) + call.bytes(2), 0)


def _gather_rows(call: Call) -> Work:
    return Work(2 * call.bytes(0) + call.bytes(2), 0)


def _normed(call: Call) -> Work:
    operations = 5 if call.family.startswith("add") else 4
    rows, d = call.sizes[:2]
    return Work(sum(_moved(call)), operations * rows * d)


def _silu_mul(call: Call) -> Work:
    rows, width = call.sizes[:2]
    return Work(3 * rows * width * call.size, 4 * rows * width)


def _route(call: Call) -> Work:
    logits = call.launch["args"][2]["b"]
    rows, experts = call.elements(logits) // call.shape(logits)[-1], call.shape(logits)[-1]
    return Work(sum(_moved(call)), 4 * rows * experts)


def _other(call: Call) -> Work:
    """A function that was emitted, or an ATen call."""
    moved = sum(_moved(call))
    if call.launch["kernel"].startswith(_PRODUCTS):
        inner = call.shape(call.launch["args"][0]["b"])[-1]
        products = inner * sum(call.elements(w) for w in call.launch["writes"])
        return Work(moved, 2 * products, sum(_moved(call, "weight")))
    largest = max((call.elements(w) for w in call.launch["writes"] if w is not None), default=0)
    return Work(moved, largest * max(len(call.launch.get("nodes", ())), 1))


def _moved(call: Call, only: str = "") -> Iterator[int]:
    """Bytes of each buffer (of one kind); of a state at most what the others index."""
    kinds = {b: call.plan["buffers"][b]["place"]["kind"] for b in call.buffers()}
    most = max((call.elements(b) for b, kind in kinds.items() if kind != "state"), default=0)
    for buffer, kind in kinds.items():
        if only not in ("", kind):
            continue
        count = call.elements(buffer)
        yield (min(count, most) if kind == "state" else count) * call.itemsize(buffer)


_FORMULAS: Mapping[str, Callable[[Call], Work]] = {
    "linear": _linear,
    "moe_ffn": _moe_ffn,
    "soft_embed": _soft_embed,
    "vocab_choice": _vocab_choice,
    "vocab_choice_asked": _vocab_choice,
    "attend": _attend,
    "norm_rope_write": _norm_rope_write,
    "embedding": _embedding,
    "gather_rows": _gather_rows,
    "rms_norm": _normed,
    "add_rms_norm": _normed,
    "silu_mul": _silu_mul,
    "route": _route,
    "route_limited": _route,
}
