"""Bytes moved and FLOPs done by every launch of an iteration, from the plan and what the iteration ran over.

What a library kernel does is its operators' work (`ir/work/formulas.py`) over what the launch has of them in
memory.  Functions printed for one plan, and calls of ATen, are counted by their buffers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dcompile.cost.call import (
    CHOICES,
    ROUTERS,
    Call,
    Facts,
    Launch,
    Plan,
    kernel_of,
    named_arguments,
)
from dcompile.ir.work import Work
from dcompile.ir.work.formulas import WORKS

_PRODUCTS = ("aten.linear.", "aten.mm.", "aten.bmm.", "aten.matmul.")


def costs(plan: Plan, facts: Facts) -> list[Work]:
    """The cost of each launch, in the plan's order."""
    calls = (Call(plan, at, facts, routed) for at, routed in enumerate(routers(plan)))
    return [_generic(call) if call.kernel is None else _operators(call) for call in calls]


def window_facts(plan: Plan) -> Facts:
    """Of a forward that computes one sequence's block at the end of the longest canvas; nobody looked."""
    rows, length = plan["sizes"]["n"], plan["sizes"]["L"]
    limits = np.full(rows, length, np.int64)
    return Facts(rows, 1, limits, np.zeros_like(limits), np.arange(rows), {}, {})


def _operators(call: Call) -> Work:
    """The work of a kernel's parts; each takes its share of the FLOPs."""
    moved, flops, streamed, touched = float(call.beside()), 0.0, 0.0, None
    for part, of in call.parts():
        work = WORKS[part.operator](of, call.touched(part, of))
        moved, streamed = moved + work.bytes, streamed + work.streamed
        flops += part.share * work.flops
        # A launch that only sorts what was routed runs no expert.
        touched = call.looked_at() if part.operator == "moe_ffn" and part.share else touched
    return Work(moved, flops, streamed, touched)


def _generic(call: Call) -> Work:
    moved = sum(_moved(call))
    if call.launch["kernel"].startswith(_PRODUCTS):
        inner = call.shape(call.launch["args"][0]["b"])[-1]
        products = inner * sum(call.elements(w) for w in call.launch["writes"])
        return Work(moved, 2 * products, sum(_moved(call, "weight")))
    largest = max((call.elements(w) for w in call.launch["writes"] if w is not None), default=0)
    return Work(moved, largest * max(len(call.launch.get("nodes", ())), 1))


def _moved(call: Call, only: str = "") -> Iterator[int]:
    """Bytes of each buffer (of one kind); of a state at most what the others index."""
    kinds = {b: call.kind(b) for b in call.buffers()}
    most = max((call.elements(b) for b, kind in kinds.items() if kind != "state"), default=0)
    for buffer, kind in kinds.items():
        if only not in ("", kind):
            continue
        count = call.elements(buffer)
        yield (min(count, most) if kind == "state" else count) * call.itemsize(buffer)


def routers(plan: Plan) -> list[int | None]:
    """For each launch that runs experts, the one that chose them."""
    chose: dict[int, int] = {}
    out: list[int | None] = []
    last: int | None = None
    for at, launch in enumerate(plan["launches"]):
        if "moe_ffn" in _names(launch):
            # One that has no experts among its arguments reads the order that the one before made.
            held = _held(launch, "moe_ffn", "experts")
            last = last if held is None else chose.get(held)
        out.append(last if "moe_ffn" in _names(launch) else None)
        if (buffer := chosen_experts(launch)) is not None:
            chose[buffer] = at
    return out


def is_router(launch: Launch) -> bool:
    return any(name in ROUTERS for name in _names(launch))


def chosen_experts(launch: Launch) -> int | None:
    """The buffer i32 [rows, k] that a router writes; what it hands to its own next launch is none."""
    for name in _names(launch):
        buffer = _held(launch, name, "experts") if name in ROUTERS else None
        if buffer in launch["writes"]:
            return buffer
    return None


def num_experts(plan: Plan) -> int | None:
    """How many experts a router chooses from; None where the plan has no router."""
    for launch in filter(is_router, plan["launches"]):
        constants = launch.get("constants", {})
        return int(constants["E"] if "E" in constants else named_arguments(launch)["E"]["i"])
    return None


def live_candidates(launch: Launch) -> int | None:
    """The buffer that says which candidates the choice of tokens is asked for."""
    kernel = kernel_of(launch)
    for part in kernel.parts if kernel is not None else ():
        if part.operator in CHOICES and part.share:
            return _held(launch, part.operator, "live")
    return None


def _names(launch: Launch) -> list[str]:
    kernel = kernel_of(launch)
    return [] if kernel is None else [part.operator for part in kernel.parts]


def _held(launch: Launch, operator: str, operand: str) -> int | None:
    """The buffer in which a kernel has an operand of an operator that it computes."""
    kernel, named = kernel_of(launch), named_arguments(launch)
    for part in kernel.parts if kernel is not None else ():
        for one in part.read() if part.operator == operator else ():
            if one.name == operand and one.argument in named:
                buffer: int | None = named[one.argument]["b"]
                return buffer
    return None
