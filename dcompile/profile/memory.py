"""What is in memory while a step runs: weights, states, and the scratch that lives at each launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcompile.cost.call import flat_arguments
from dcompile.runtime.plan import Plan, base_of


@dataclass(frozen=True)
class Held:
    """One value of the step in scratch, alive from launch `first` to launch `last`."""

    name: str
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at the iteration with most rows; `live` is the scratch alive at each launch."""

    weights: int
    state: int
    inputs: int
    scratch: int
    """The arena: slots that values share, each as large as its largest."""
    values: int
    """What the scratch would be, had each value its own place."""
    live: list[int]
    peak: str
    """The launch at which most is alive."""
    buffers: list[Held]
    """What is alive then, largest first."""
    before: int
    """Of the process, before it opened the artifact."""
    resident: list[int]
    """Of the process after each iteration, mapped weights among it."""


def memory(plan: Plan, R: int, B: int, before: int, resident: list[int]) -> Memory:
    """The memory of a step of R rows and B sequences."""
    sizes: dict[str, int] = {"weight": 0, "state": 0, "input": 0, "slot": 0, "zeroed": 0}
    slots = [0] * plan.slots
    for buffer in plan.buffers:
        if buffer.kind == "view":
            continue
        sizes[buffer.kind] += buffer.bytes(R, B)
        if buffer.kind == "slot":
            slots[buffer.slot] = max(slots[buffer.slot], buffer.bytes(R, B))
    held = _held(plan, R, B)
    live = [
        sum(h.bytes for h in held if h.first <= at <= h.last) for at in range(len(plan.launches))
    ]
    peak = max(range(len(live)), key=live.__getitem__, default=0)
    return Memory(
        weights=sizes["weight"],
        state=sizes["state"],
        inputs=sizes["input"],
        scratch=sum(slots),
        values=sizes["slot"],
        live=live,
        peak=plan.launches[peak].name if plan.launches else "",
        buffers=sorted(
            (h for h in held if h.first <= peak <= h.last), key=lambda h: h.bytes, reverse=True
        ),
        before=before,
        resident=resident,
    )


def _held(plan: Plan, R: int, B: int) -> list[Held]:
    spans: dict[int, tuple[int, int]] = {}
    for at, launch in enumerate(plan.text["launches"]):
        for buffer in _touched(launch):
            root = base_of(plan.buffers, buffer)
            if plan.buffers[root].kind == "slot":
                spans[root] = (spans.get(root, (at, at))[0], at)
    for buffer in plan.outputs.values():
        root = base_of(plan.buffers, buffer)
        if root in spans:
            spans[root] = (spans[root][0], len(plan.launches) - 1)
    return [
        Held(plan.buffers[root].name, plan.buffers[root].bytes(R, B), first, last)
        for root, (first, last) in spans.items()
    ]


def _touched(launch: Mapping[str, Any]) -> list[int]:
    read = [arg["b"] for arg in flat_arguments(launch) if isinstance(arg, dict) and "b" in arg]
    return [b for b in [*read, *launch["writes"]] if b is not None]
