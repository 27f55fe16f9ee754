"""Looking into a step while it runs: which experts its routers chose, which candidates are undecided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dcompile.cost.call import Facts, Ints
from dcompile.cost.call import Plan as PlanText
from dcompile.cost.launches import chosen_experts, is_router, live_candidates
from dcompile.runtime.plan import Plan
from dcompile.runtime.state import Binding

Floats = npt.NDArray[np.float64]


class Launcher(Protocol):
    """What a watch asks of the executor, on whatever device."""

    plan: Plan

    @property
    def state(self) -> Mapping[str, Any]: ...

    def launch(
        self,
        binding: Binding,
        seconds: Floats | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Run launches `part` (default all); `seconds` takes each one's time on the device."""


def probes(plan: PlanText) -> dict[int, int]:
    """After which launch which buffer is looked at: experts routed to, candidates undecided."""
    out = {}
    for at, launch in enumerate(plan["launches"]):
        found = chosen_experts(launch)
        buffer = found if found is not None else live_candidates(launch)
        if buffer is not None:
            out[at] = buffer
    return out


def look(executor: Launcher, binding: Binding, probes: Mapping[int, int]) -> dict[int, Any]:
    """One step, stopped after each probed launch for a copy of its buffer: a later one may use the place."""
    found, at = {}, 0
    for launch, buffer in sorted(probes.items()):
        executor.launch(binding, part=(at, launch + 1))
        found[launch] = binding.values(buffer).copy()
        at = launch + 1
    executor.launch(binding, part=(at, len(executor.plan.launches)))
    return found


def chosen(plan: PlanText, looked: Mapping[int, Any]) -> tuple[dict[int, Ints], dict[int, int]]:
    """What `look` found, as `Facts` has it: experts by launch, and how many candidates are live."""
    routers = {at for at in looked if is_router(plan["launches"][at])}
    experts = {at: values for at, values in looked.items() if at in routers}
    return experts, {at: int(v.sum()) for at, v in looked.items() if at not in routers}


def step_facts(executor: Launcher, plan: PlanText, binding: Binding) -> Facts:
    """What one step runs over; the step is run for it."""
    looked = chosen(plan, look(executor, binding, probes(plan)))
    zeros = np.zeros(binding.R, np.int64)
    limits, sequences = (binding.arrays.get(name, zeros) for name in ("row_limit", "row_seq"))
    rows = binding.arrays.get("choice_row")
    asked = None if rows is None else rows.reshape(-1)
    return Facts(binding.R, binding.B, limits, sequences, asked, *looked)
